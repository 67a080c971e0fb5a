"""The Triton kernels: products of 8-bit codes in the tensor cores with scales at the end, and codes of tokens.

out^T = W X^T, as in w4a16_gemm: the features of a tile are the rows that wgmma needs, also with one token. In both
operands k is the innermost dimension, as wgmma requires for 8 bits. int8 is summed in int32, so that any split of k
gives the same result; e4m3 is summed in float32, and the sums leave the tensor core every 128 columns, since it adds
with fewer bits. GPUs below compute capability 8.9 have no e4m3: its bits, placed in fp16 (e4m3 times 2^-8, exact), are
multiplied.

Tokens are quantized by a launch of their own: programs of the product would each have to read all columns of x before
the first of the weight. Programs that split k store their sums and count themselves per tile; the last one adds them in
their order and multiplies by the scales, so that a product is one launch (ops/split_sums.py).

Shapes: M tokens, N output features, K input features; runs under Triton 3.6 to 3.9.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching
from lightning_compress.ops.prepared import PreparedKernel
from lightning_compress.ops.split_sums import workspace
from lightning_compress.ops.w8a8_gemm.reference import HALF_RANGE

__all__ = [
    "W8Launch", "e4m3_half", "e4m3_mode", "gemm", "gemm_kernel", "prepare", "prepare_quantize", "quantize_kernel",
    "quantize_static", "quantize_tokens", "rule", "scale_kernel", "scale_sums",
]  # fmt: skip

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class W8Launch:
    """Tile of block_m tokens and block_n features, block_k columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    warps: int
    stages: int


def rule(M: int, N: int, K: int, processors: int) -> W8Launch:
    """Small tiles while memory bounds the product, k split until every processor has a tile; not measured yet."""
    few = M <= 64
    block_m, block_n = min(max(16, 1 << (M - 1).bit_length()), 128), 64 if few else 128
    tiles, blocks, split = triton.cdiv(M, block_m) * triton.cdiv(N, block_n), triton.cdiv(K, 128), 1
    while tiles * split < processors and blocks >= 2 * split * 4:  # at least 4 blocks for each split
        split *= 2
    return W8Launch(block_m, block_n, 128, split, warps=4 if few else 8, stages=6 if few else 3)


def gemm(
    codes_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype,
    launch: W8Launch | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``dtype``; arguments as ``w8a8_gemm`` checks them, codes and weight of one dtype."""
    multiply = _prepare_gemm(len(codes_MK), int(len(scale_M) > 1), weight_NK, scale_N, dtype, launch)
    return multiply(codes_MK.view(torch.int8), scale_M)


def prepare(x: Tensor, scale: Tensor | None, weight_NK: Tensor, scale_N: Tensor) -> Callable[[Tensor], Tensor]:
    """``w8a8_linear`` as a function of contiguous x [..., K], for others of the same ``call_key``; M > 0 and N > 0."""
    (N, K), kind = weight_NK.shape, weight_NK.dtype
    M, shape = x.numel() // K, (*x.shape[:-1], N)
    quotient = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    fixed_scale = None if scale is None else scale.float()
    quantize = prepare_quantize(M, K, x.dtype, kind, quotient, dynamic=scale is None)
    multiply = _prepare_gemm(M, int(scale is None and M > 1), weight_NK, scale_N, x.dtype)

    def linear(x: Tensor) -> Tensor:
        return multiply(*quantize(x, fixed_scale)).view(shape)

    return linear


def _prepare_gemm(
    M: int, step_m: int, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype, launch: W8Launch | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """y [M, N] of codes, int8 or the bits of e4m3, and their scales."""
    (N, K), device, integer = weight_NK.shape, weight_NK.device, weight_NK.dtype == torch.int8
    launch = launch or rule(M, N, K, torch.cuda.get_device_properties(device).multi_processor_count)
    native, interpreted = e4m3_mode(device)
    constants = {
        "INTEGER": integer, "NATIVE": native, "INTERPRETED": interpreted, "SPLIT": launch.split,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
    }  # fmt: skip
    grid = (triton.cdiv(N, launch.block_n), triton.cdiv(M, launch.block_m), launch.split)
    kernel = PreparedKernel(gemm_kernel, grid, constants, num_warps=launch.warps, num_stages=launch.stages)
    per_split = triton.cdiv(triton.cdiv(K, launch.block_k), launch.split) * launch.block_k
    split, tiles, numbers = launch.split, grid[0] * grid[1], (M, N, K, per_split, step_m, int(len(scale_N) > 1))
    weight_NK = weight_NK.view(torch.int8)

    def multiply(codes: Tensor, scale_M: Tensor) -> Tensor:
        out = torch.empty((M, N), dtype=dtype, device=device)
        with launching(codes):
            parts, counters = workspace(codes, M, N, split, tiles)
            if parts is not None and integer:
                parts = parts.view(torch.int32)
            kernel(codes, weight_NK, scale_M, scale_N, out, parts, counters, *numbers)
        return out

    return multiply


def scale_sums(sums_MN: Tensor, scale_M: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """y [M, N] in ``dtype`` of sums that torch computed, int32 or float32."""
    M, N = sums_MN.shape
    out = torch.empty((M, N), dtype=dtype, device=sums_MN.device)
    with launching(sums_MN):
        scale_kernel[(triton.cdiv(N, 1024), M)](
            sums_MN, scale_M, scale_N, out, N, int(len(scale_M) > 1), int(len(scale_N) > 1), BLOCK=1024, num_warps=4
        )
    return out


def e4m3_mode(device: torch.device) -> tuple[bool, bool]:
    """Whether the tensor cores have e4m3, and whether Triton's interpreter runs (which rounds to e4m3 differently)."""
    interpreted = not isinstance(gemm_kernel, triton.JITFunction)
    return not interpreted and torch.cuda.get_device_capability(device) >= (8, 9), interpreted


def quantize_tokens(x_MK: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] of ``kind`` and scales float32 [M], of x float16, bfloat16 or float32."""
    M, K = x_MK.shape
    quantize = prepare_quantize(M, K, x_MK.dtype, kind, x_MK.dtype, dynamic=True)
    codes, scale_M = quantize(x_MK.contiguous(), None)
    return codes.view(kind), scale_M


def quantize_static(x_MK: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Codes [M, K] of ``kind`` for one scale [1]; the quotient has the promoted dtype of both."""
    (M, K), quotient = x_MK.shape, torch.promote_types(x_MK.dtype, scale.dtype)
    quantize = prepare_quantize(M, K, x_MK.dtype, kind, quotient, dynamic=False)
    return quantize(x_MK.contiguous(), scale.float())[0].view(kind)


def prepare_quantize(
    M: int, K: int, dtype: torch.dtype, kind: torch.dtype, quotient: torch.dtype, *, dynamic: bool
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Codes of contiguous x as int8, and their scales: those given, or if dynamic new ones."""
    constants = {
        "INTEGER": kind == torch.int8, "DYNAMIC": dynamic, "QUOTIENT": TRITON_DTYPES[quotient],
        "BLOCK": min(triton.next_power_of_2(K), 4096),
    }  # fmt: skip
    kernel = PreparedKernel(quantize_kernel, (M, 1, 1), constants, num_warps=8)
    half_range, epsilon = HALF_RANGE[kind], torch.finfo(dtype).eps

    def quantize(x: Tensor, scale_M: Tensor | None) -> tuple[Tensor, Tensor]:
        codes = torch.empty((M, K), dtype=torch.int8, device=x.device)
        if scale_M is None:
            scale_M = torch.empty((M,), dtype=torch.float32, device=x.device)
        with launching(x):
            kernel(x, codes, scale_M, K, half_range, epsilon)
        return codes, scale_M

    return quantize


@triton.jit
def gemm_kernel(
    codes_ptr, weight_ptr, scale_m_ptr, scale_n_ptr, out_ptr, parts_ptr, counter_ptr, M, N, K, per_split, step_m,
    step_n, INTEGER: tl.constexpr, NATIVE: tl.constexpr, INTERPRETED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``step_m`` and ``step_n`` are 0 for one scale in all."""
    row_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2)
    column_K = tl.arange(0, BLOCK_K)
    rows, tokens = row_N < N, token_M < M
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    for k in range(split * per_split, tl.minimum((split + 1) * per_split, K), BLOCK_K):
        columns = k + column_K < K
        w_NK = tl.load(
            weight_ptr + row_N[:, None] * K + (k + column_K)[None, :], mask=rows[:, None] & columns[None, :], other=0
        )
        x_KM = tl.load(
            codes_ptr + token_M[None, :] * K + (k + column_K)[:, None], mask=tokens[None, :] & columns[:, None], other=0
        )
        if INTEGER:
            sums_NM = tl.dot(w_NK, x_KM, sums_NM, out_dtype=tl.int32)
        elif NATIVE:
            sums_NM += tl.dot(w_NK.to(tl.float8e4nv, bitcast=True), x_KM.to(tl.float8e4nv, bitcast=True))
        else:
            w_NK, x_KM = e4m3_half(w_NK), e4m3_half(x_KM)
            if INTERPRETED:  # NumPy is slow in fp16
                w_NK, x_KM = w_NK.to(tl.float32), x_KM.to(tl.float32)
            sums_NM = tl.dot(w_NK, x_KM, sums_NM)
    if not INTEGER and not NATIVE:
        sums_NM *= 65536.0  # 2^8 for each operand
    inside = rows[:, None] & tokens[None, :]
    last = True
    if SPLIT > 1:
        parts_ptr += row_N[:, None] + token_M[None, :] * N
        tl.store(parts_ptr + split.to(tl.int64) * M * N, sums_NM, mask=inside)
        tl.debug_barrier()  # all threads have written before one of them counts
        counter_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            sums_NM = tl.zeros_like(sums_NM)
            for part in tl.static_range(SPLIT):  # .cg: past the L1, which other processors do not write
                part_ptr = parts_ptr + tl.cast(part, tl.int64) * M * N
                sums_NM += tl.load(part_ptr, mask=inside, other=0, cache_modifier=".cg")
            tl.store(counter_ptr, 0)
        s_N = tl.load(scale_n_ptr + row_N * step_n, mask=rows, other=0.0)
        s_M = tl.load(scale_m_ptr + token_M * step_m, mask=tokens, other=0.0)
        y_NM = (sums_NM * s_N[:, None] * s_M[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token_M[None, :] * N + row_N[:, None], y_NM, mask=inside)


@triton.jit
def scale_kernel(sums_ptr, scale_m_ptr, scale_n_ptr, out_ptr, N, step_m, step_n, BLOCK: tl.constexpr):
    """A piece of a row of sums times its scales."""
    column_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = column_B < N
    sums_B = tl.load(sums_ptr + row * N + column_B, mask=inside, other=0).to(tl.float32)
    s_B = tl.load(scale_n_ptr + column_B * step_n, mask=inside, other=0.0)
    y_B = sums_B * s_B * tl.load(scale_m_ptr + row * step_m)
    tl.store(out_ptr + row * N + column_B, y_B.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, K, half_range, epsilon,
    INTEGER: tl.constexpr, DYNAMIC: tl.constexpr, QUOTIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token; DYNAMIC: with a scale of its own, for which it is read twice, the second time from L2."""
    start = tl.program_id(0).to(tl.int64) * K
    if DYNAMIC:
        largest_B = tl.zeros((BLOCK,), tl.int32)
        for k in range(0, K, BLOCK):
            column_B = k + tl.arange(0, BLOCK)
            x_B = tl.load(x_ptr + start + column_B, mask=column_B < K, other=0.0)
            largest_B = tl.maximum(largest_B, _magnitude(x_B))
        scale = _token_scale(tl.max(largest_B, 0), half_range, epsilon, x_ptr.dtype.element_ty)
        tl.store(scale_ptr + tl.program_id(0), scale)
    else:
        scale = tl.load(scale_ptr)
    for k in range(0, K, BLOCK):
        column_B = k + tl.arange(0, BLOCK)
        x_B = tl.load(x_ptr + start + column_B, mask=column_B < K, other=0.0)
        tl.store(codes_ptr + start + column_B, _codes(x_B, scale, QUOTIENT, INTEGER), mask=column_B < K)


@triton.jit
def _magnitude(x):
    """Bits of |x| in float32, in the order of the numbers, with NaN, which a maximum of floats would drop, on top."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _token_scale(largest, half_range, epsilon, dtype: tl.constexpr):
    half = tl.zeros_like(largest).to(tl.float32) + half_range
    scale = _rounded(tl.div_rn(largest.to(tl.float32, bitcast=True), half), dtype)
    return tl.where(scale == 0, epsilon, scale)


@triton.jit
def _codes(x, scale, dtype: tl.constexpr, INTEGER: tl.constexpr):
    """int8 of x / scale, the quotient rounded to ``dtype``: an integer, or the bits of e4m3."""
    x = x.to(tl.float32)
    v = _rounded(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), dtype)
    if INTEGER:
        codes = tl.minimum(tl.maximum((v + 12582912.0) - 12582912.0, -128.0), 127.0).to(tl.int8)  # ties to even
    else:
        size = tl.minimum(tl.abs(v), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # from 2^-6 on
        steps = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # multiples of 2^-9, below
        code = tl.where(size < 0.015625, steps, normal) | ((v.to(tl.int32, bitcast=True) >> 24) & 0x80)
        codes = tl.where(v == v, code, 0x7F).to(tl.int8)
    return codes


@triton.jit
def _rounded(v, dtype: tl.constexpr):
    """v rounded to the nearest number of ``dtype``, ties to even; on bits for bf16, since the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        v = v.to(tl.float16).to(tl.float32)
    return v


@triton.jit
def e4m3_half(codes):
    """fp16 of int8 bits of e4m3, times 2^-8: sign, exponent and mantissa moved to their positions."""
    bits = codes.to(tl.int16)
    return ((bits & -32768) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
