"""The Triton kernel: out^T = W X^T with int4 weights and tokens in 8 bits, in the design of w4a16_gemm.

One program computes a tile of BLOCK_N features times BLOCK_M tokens. For each block of two planes (layout.py) it loads
a tile of bytes and converts its codes to 8-bit operands, four at a time: e4m3 of code 2^-9 for FP8 tokens, int8 for
int8 tokens. Group scales multiply the sums of a group, which leave the tensor core at least every 128 columns, since it
adds e4m3 products with fewer bits than float32 has. GPUs below compute capability 8.9 have no e4m3: its bits are placed
in fp16.

The scales of a block are loaded one block ahead.

Shapes: M tokens, N output features, K input features, G groups; runs under Triton 3.6 to 3.9.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching
from lightning_compress.ops.split_sums import store_sums
from lightning_compress.ops.w4a8_gemm.layout import PLANES, plane_of
from lightning_compress.ops.w4a16_gemm.kernel import as_floats, load_words, rounded, split_product
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, rule
from lightning_compress.ops.w8a8_gemm.kernel import e4m3_half, e4m3_mode, prepare_quantize

__all__ = ["codes_kernel", "constants", "dense", "dense_kernel", "eight_bits", "gemm", "prepare", "w4a8_kernel"]

DENSE_ROWS = 64  # of a program of dense_kernel and codes_kernel


def gemm(
    codes_MK: Tensor, scale_M: Tensor, planes_NP: Tensor, scale_GN: Tensor, dtype: torch.dtype,
    launch: W4Launch | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``dtype``; codes int8 or float8_e4m3fn, contiguous, the weight as ``w4a8_gemm`` checks it."""
    M, N = len(codes_MK), scale_GN.shape[1]
    if M == 0:
        return codes_MK.new_empty(0, N, dtype=dtype)
    multiply = _prepare_gemm((M, N), codes_MK.shape[1], planes_NP, scale_GN, codes_MK.dtype, dtype, launch)
    return multiply(codes_MK.view(torch.int8), scale_M)


def prepare(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``w4a8_gemm`` as a function of contiguous x [..., K], for others of the same ``call_key``; M > 0."""
    K, N = x.shape[-1], scale_GN.shape[1]
    quantize = prepare_quantize(x.numel() // K, K, x.dtype, kind, x.dtype, dynamic=True)
    multiply = _prepare_gemm((*x.shape[:-1], N), K, planes_NP, scale_GN, kind, x.dtype)
    return lambda x: multiply(*quantize(x, None))


def _prepare_gemm(
    shape: tuple[int, ...], K: int, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype, dtype: torch.dtype,
    launch: W4Launch | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """y, of this shape, of the codes [M, K] of tokens, int8 or the bits of e4m3, and of their scales [M]."""
    M, N, device = math.prod(shape[:-1]), shape[-1], planes_NP.device
    if launch is None:
        launch = rule(M, N, K, torch.bfloat16, torch.cuda.get_device_properties(device).multi_processor_count)
    fixed = constants(launch, len(scale_GN), K, kind, *e4m3_mode(device))
    return split_product(w4a8_kernel, (planes_NP, scale_GN), shape, dtype, launch, fixed, (M, N, K))


def dense(planes_NP: Tensor, scale_GN: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype``: one launch, which writes each weight and reads half a byte of it; any group size."""
    G, N = scale_GN.shape
    W_NK = torch.empty((N, K), dtype=dtype, device=planes_NP.device)
    interpreted, plane = not isinstance(dense_kernel, triton.JITFunction), plane_of(K, G)
    if N:
        with launching(planes_NP):
            dense_kernel[(triton.cdiv(K, PLANES * plane), triton.cdiv(N, DENSE_ROWS))](
                planes_NP, scale_GN, W_NK, N, K, GROUP=K // G, PLANE=plane, INTERPRETED=interpreted, BLOCK_N=DENSE_ROWS
            )
    return W_NK


def eight_bits(planes_NP: Tensor, K: int, groups: int, kind: torch.dtype) -> Tensor:
    """The codes [N, K] as int8, or as float8_e4m3fn times 2^-9: one launch, 1.5 bytes of a weight."""
    N, plane = len(planes_NP), plane_of(K, groups)
    codes_NK = torch.empty((N, K), dtype=torch.int8, device=planes_NP.device)
    interpreted = not isinstance(codes_kernel, triton.JITFunction)
    if N:
        with launching(planes_NP):
            codes_kernel[(triton.cdiv(K, PLANES * plane), triton.cdiv(N, DENSE_ROWS))](
                planes_NP, codes_NK, N, K, PLANE=plane, INTEGER=kind == torch.int8, INTERPRETED=interpreted,
                BLOCK_N=DENSE_ROWS,
            )  # fmt: skip
    return codes_NK.view(kind)


def constants(
    launch: W4Launch, groups: int, K: int, kind: torch.dtype, native: bool, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    plane = plane_of(K, groups)
    return {
        "GROUP": 0 if groups == 1 else K // groups,
        "PLANE": plane,
        "WHOLE": K % (PLANES * plane) == 0,
        "SPLIT": launch.split,
        "INTEGER": kind == torch.int8,
        "NATIVE": native,
        "INTERPRETED": interpreted,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def w4a8_kernel(
    codes_ptr, scale_m_ptr, planes_ptr, scale_ptr, out_ptr, parts_ptr, counter_ptr, M, N, K,
    GROUP: tl.constexpr, PLANE: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, INTEGER: tl.constexpr,
    NATIVE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GROUP columns, a multiple of PLANE, have one scale (0: all columns of a row)."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_N = tl.minimum(row_N, N - 1)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column_c = tl.arange(0, PLANE)
    rows, tokens = row_N < N, token_M < M
    blocks = tl.cdiv(K, 2 * PLANE)
    first = tl.program_id(2) * tl.cdiv(blocks, SPLIT)
    end = tl.minimum(first + tl.cdiv(blocks, SPLIT), blocks)
    SCALES: tl.constexpr = 0 if GROUP == 0 else 1 if GROUP % (2 * PLANE) == 0 else 2  # of a block
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    dtype: tl.constexpr = scale_ptr.dtype.element_ty

    bytes_ptr = planes_ptr + row_N[:, None] * (blocks * PLANE) + column_c[None, :]
    tokens_ptr = codes_ptr + token_M[None, :] * K + column_c[:, None]
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ahead = _scales(scale_ptr, first, blocks, K, N, grid_N, rows, GROUP, PLANE, SCALES, not INTERPRETED)
    for b in range(first, end):
        scales = ahead  # in front of the barrier of the words, below which ptxas would move the loads
        ahead = _scales(scale_ptr, b + 1, blocks, K, N, grid_N, rows, GROUP, PLANE, SCALES, not INTERPRETED)
        bytes_Nc = tl.load(bytes_ptr + b * PLANE, mask=rows[:, None], other=0)
        group_NM = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        for j in tl.static_range(2):
            k = (b * 2 + j) * PLANE
            if WHOLE:
                inside = tokens[None, :]
            else:
                inside = tokens[None, :] & (k + column_c < K)[:, None]
            x_cM = tl.load(tokens_ptr + k, mask=inside, other=0)
            w_Nc = _operand(bytes_Nc, j, INTEGER, INTERPRETED)
            if SCALES == 2:
                group_NM = tl.zeros((BLOCK_N, BLOCK_M), SUM)
            if INTEGER:
                group_NM = tl.dot(w_Nc, x_cM, group_NM, out_dtype=tl.int32)
            elif NATIVE:
                group_NM = tl.dot(w_Nc.to(tl.float8e4nv, bitcast=True), x_cM.to(tl.float8e4nv, bitcast=True), group_NM)
            else:
                w_Nc, x_cM = e4m3_half(w_Nc), e4m3_half(x_cM)
                if INTERPRETED:  # NumPy is slow in fp16
                    w_Nc, x_cM = w_Nc.to(tl.float32), x_cM.to(tl.float32)
                group_NM = tl.dot(w_Nc, x_cM, group_NM)
            if SCALES == 2:
                sums_NM += group_NM.to(tl.float32) * as_floats(scales[j], dtype).to(tl.float32)[:, None]
        if SCALES == 1:
            sums_NM += group_NM.to(tl.float32) * as_floats(scales[0], dtype).to(tl.float32)[:, None]
        elif SCALES == 0:
            sums_NM += group_NM.to(tl.float32)
    if SCALES == 0:
        scale_N = tl.load(scale_ptr + row_N, mask=rows, other=0.0).to(tl.float32)
        sums_NM *= scale_N[:, None]
    FACTOR: tl.constexpr = 1.0 if INTEGER else 512.0 if NATIVE else 33554432.0  # 2^9; and 2^8 for each side in fp16
    scale_M = tl.load(scale_m_ptr + token_M, mask=tokens, other=0.0) * FACTOR
    store_sums(sums_NM * scale_M[None, :], out_ptr, parts_ptr, counter_ptr, M, N, row_N, token_M, SPLIT)


@triton.jit
def _scales(
    scale_ptr, b, blocks, K, N, grid_N, rows, GROUP: tl.constexpr, PLANE: tl.constexpr, SCALES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The scales of block b of the rows of a tile."""
    b = tl.minimum(b, blocks - 1)  # the loop looks one block too far
    scales = ()
    for i in tl.static_range(SCALES):  # planes past K have no group; their x is 0
        group = tl.minimum((b * 2 + i) * PLANE, K - 1) // GROUP
        scales += (load_words(scale_ptr + group * N + grid_N, rows, ASM),)  # type: ignore[assignment]
    return scales


@triton.jit
def _operand(bytes_Nc, J: tl.constexpr, INTEGER: tl.constexpr, INTERPRETED: tl.constexpr):
    """int8: the codes of plane J as integers, or as bits of e4m3, times 2^-9."""
    if INTERPRETED:
        nibble_Nc = (bytes_Nc.to(tl.int32) >> (4 * J)) & 15
        sign_Nc = nibble_Nc >> 3
        w_Nc = (nibble_Nc ^ (sign_Nc * 0xF7) if INTEGER else nibble_Nc + sign_Nc * 0x79).to(tl.int8)
    else:
        w_Nc = tl.inline_asm_elementwise(
            _four_codes(4 * J, INTEGER), "=r,r", [bytes_Nc], dtype=tl.int8, is_pure=True, pack=4
        )
    return w_Nc


@triton.constexpr_function
def _four_codes(shift: int, integer: bool) -> str:
    """PTX: four codes from the half bytes at ``shift``."""
    body = f"shr.b32 t, $1, {shift}; and.b32 t, t, 0x0f0f0f0f; shr.b32 s, $1, {shift + 3}; and.b32 s, s, 0x01010101; "
    body += "mul.lo.u32 s, s, 0xf7; xor.b32 $0, s, t; " if integer else "mad.lo.u32 $0, s, 0x79, t; "
    return "{ .reg .b32 s, t; " + body + "}"


@triton.jit
def dense_kernel(
    planes_ptr, scale_ptr, out_ptr, N, K,
    GROUP: tl.constexpr, PLANE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Code times scale, in float32, rounded to the dtype of out [N, K]."""
    row_N1, column_1c = _rows(BLOCK_N), tl.arange(0, PLANE)[None, :]
    bytes_Nc = _bytes(planes_ptr, row_N1, N, K, PLANE).to(tl.int32)
    for j in tl.static_range(2):
        k = (tl.program_id(0) * 2 + j) * PLANE
        if GROUP % PLANE == 0:  # planes past K have no group
            at = tl.minimum(k, K - 1) // GROUP * N + row_N1
        else:
            at = tl.minimum(k + column_1c, K - 1) // GROUP * N + row_N1
        scale = tl.load(scale_ptr + at, mask=row_N1 < N, other=0.0).to(tl.float32)
        nibble_Nc = (bytes_Nc >> (4 * j)) & 15
        code_Nc = tl.where(nibble_Nc > 7, 7 - nibble_Nc, nibble_Nc)
        out_Nc = rounded(code_Nc.to(tl.float32) * scale, out_ptr.dtype.element_ty, INTERPRETED)
        inside = (row_N1 < N) & (k + column_1c < K)
        tl.store(out_ptr + row_N1.to(tl.int64) * K + k + column_1c, out_Nc, mask=inside)


@triton.jit
def codes_kernel(
    planes_ptr, out_ptr, N, K,
    PLANE: tl.constexpr, INTEGER: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The codes as 8-bit operands, [N, K]."""
    row_N1, column_1c = _rows(BLOCK_N), tl.arange(0, PLANE)[None, :]
    bytes_Nc = _bytes(planes_ptr, row_N1, N, K, PLANE)
    for j in tl.static_range(2):
        k = (tl.program_id(0) * 2 + j) * PLANE
        inside = (row_N1 < N) & (k + column_1c < K)
        code_Nc = _operand(bytes_Nc, j, INTEGER, INTERPRETED)
        tl.store(out_ptr + row_N1.to(tl.int64) * K + k + column_1c, code_Nc, mask=inside)


@triton.jit
def _rows(BLOCK_N: tl.constexpr):
    return (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]


@triton.jit
def _bytes(planes_ptr, row_N1, N, K, PLANE: tl.constexpr):
    """The bytes of two planes."""
    at = row_N1.to(tl.int64) * (tl.cdiv(K, 2 * PLANE) * PLANE) + tl.program_id(0) * PLANE
    return tl.load(planes_ptr + at + tl.arange(0, PLANE)[None, :], mask=row_N1 < N, other=0)
