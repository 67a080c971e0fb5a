"""The Triton kernel: out^T = W X^T with FP4 weights, in the design of w4a16_gemm.

One program computes a tile of BLOCK_N features times BLOCK_M tokens. For each block of 128 columns it loads a tile of
16-bit words and, plane by plane (layout.py), places the bits of its codes in bf16 or fp16 numbers: one shift and one
mask for two codes, no constant is subtracted; the fourth plane is joined from three pieces. These numbers are codes
times 2^-126 (bf16) or 2^-14 (fp16); the product with the scale, times 2^127 or 2^15, gives the weights. Code and scale
have six significant bits together, so that this product is exact, also in fp16 (where scales below 2^-24 of the largest
of a row lose bits), and the scales can be applied before the sums. The divisor of each row is applied last.

The scales of a block are loaded one block ahead, as words of four rows, and become numbers before they are spread over
the columns.

float32 tokens are split into two TF32 numbers, in which the weights are exact.

Shapes: M tokens, N output features, K input features, G groups; runs under Triton 3.6 to 3.9.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fp4_gemm.layout import Layout
from lightning_compress.ops.launches import launching
from lightning_compress.ops.split_sums import store_sums
from lightning_compress.ops.w4a16_gemm.kernel import rounded, split_product
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, choose

__all__ = ["constants", "dense", "dense_kernel", "fp4_kernel", "gemm", "prepare"]

DENSE_ROWS = 64  # of a program of dense_kernel


def gemm(x_MK: Tensor, layout: Layout, launch: W4Launch | None = None) -> Tensor:
    """The product x W^T [M, N] in the dtype of x; arguments as ``fp4_gemm`` checks them, groups of 16 n columns."""
    if not len(x_MK):
        return x_MK.new_empty(0, layout.scale.shape[1])
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    return prepare(x_MK, layout, launch)(x_MK)


def prepare(x: Tensor, layout: Layout, launch: W4Launch | None = None) -> Callable[[Tensor], Tensor]:
    """The product as a function of x, for others of the same ``call_key``: [M, K], or contiguous [..., K]."""
    K, (G, N) = x.shape[-1], layout.scale.shape
    launch = launch or choose(x.numel() // K, N, K, x.dtype, x.device)
    fixed = constants(launch, G, K, x.dtype, not isinstance(fp4_kernel, triton.JITFunction))
    numbers = x.numel() // K, N, K, x.stride(-2) if x.ndim > 1 else K
    return split_product(fp4_kernel, layout, (*x.shape[:-1], N), x.dtype, launch, fixed, numbers)


def dense(layout: Layout, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype``: one launch, which writes each weight and reads half a byte of it; any group size."""
    G, N = layout.scale.shape
    W_NK = torch.empty((N, K), dtype=dtype, device=layout.planes.device)
    interpreted = not isinstance(dense_kernel, triton.JITFunction)
    if N:
        with launching(layout.planes):
            dense_kernel[(triton.cdiv(K, 128), triton.cdiv(N, DENSE_ROWS))](
                *layout, W_NK, N, K, GROUP=K // G, INTERPRETED=interpreted, BLOCK_N=DENSE_ROWS
            )
    return W_NK


def constants(
    launch: W4Launch, groups: int, K: int, dtype: torch.dtype, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "GROUP": K // groups,
        "WHOLE": K % 128 == 0,
        "SPLIT": launch.split,
        "BITS": dtype == torch.float16 or (dtype == torch.bfloat16 and not interpreted),
        "ASM": not interpreted,
        "INTERPRETED": interpreted,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def fp4_kernel(
    x_ptr, planes_ptr, scale_ptr, divisor_ptr, out_ptr, parts_ptr, counter_ptr, M, N, K, stride_x,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GROUP columns, a multiple of 16, have one scale; BITS and ASM select how codes become floats."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column_c = tl.arange(0, 32)
    rows, tokens = row_N < N, token_M < M
    blocks = tl.cdiv(K, 128)
    first = tl.program_id(2) * tl.cdiv(blocks, SPLIT)

    words_ptr = planes_ptr + row_N[:, None] * (blocks * 32) + column_c[None, :]
    tokens_ptr = x_ptr + token_M[None, :] * stride_x + column_c[:, None]
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    SCALES: tl.constexpr = 4 if GROUP % 32 == 0 else 8  # of a block: one for each plane, or two
    ahead = _scales(scale_ptr, first, blocks, K, N, row_N, rows, GROUP, SCALES)
    for b in range(first, tl.minimum(first + tl.cdiv(blocks, SPLIT), blocks)):
        bytes_NS = ahead  # in front of the barrier of the words, below which ptxas would move the next load
        ahead = _scales(scale_ptr, b + 1, blocks, K, N, row_N, rows, GROUP, SCALES)
        scales = _columns(_number(bytes_NS, x_ptr.dtype.element_ty, BITS), SCALES)
        words_Nc = tl.load(words_ptr + b * 32, mask=rows[:, None], other=0)
        for j in tl.static_range(4):
            k = b * 128 + j * 32
            if WHOLE:
                inside = tokens[None, :]
            else:
                inside = tokens[None, :] & (k + column_c < K)[:, None]
            x_cM = tl.load(tokens_ptr + k, mask=inside, other=0.0)
            if SCALES == 4:
                scale_Nc = scales[j][:, None]
            else:
                scale_Nc = tl.where(column_c[None, :] < 16, scales[2 * j][:, None], scales[2 * j + 1][:, None])
            w_Nc = _weights(words_Nc, scale_Nc, j, x_ptr.dtype.element_ty, BITS, ASM)
            if x_ptr.dtype.element_ty == tl.float32:  # weights are exact in TF32, x is split in two
                high_cM = (x_cM.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                sums_NM = tl.dot(w_Nc, high_cM, sums_NM, input_precision="tf32")
                x_cM -= high_cM
            if INTERPRETED:  # NumPy has no bf16, and is slow in fp16
                w_Nc, x_cM = w_Nc.to(tl.float32), x_cM.to(tl.float32)
            sums_NM = tl.dot(w_Nc, x_cM, sums_NM, input_precision="tf32")
    divisor_N = tl.load(divisor_ptr + row_N, mask=rows, other=1.0)
    sums_NM *= (1.0 / divisor_N)[:, None]
    store_sums(sums_NM, out_ptr, parts_ptr, counter_ptr, M, N, row_N, token_M, SPLIT)


@triton.jit
def _scales(scale_ptr, b, blocks, K, N, row_N, rows, GROUP: tl.constexpr, SCALES: tl.constexpr):
    """The bytes of the SCALES scales of block b, for the rows of a tile: four rows are a word of memory."""
    column_S = tl.minimum(b, blocks - 1) * 128 + (128 // SCALES) * tl.arange(0, SCALES)  # the loop looks one too far
    group_S = tl.minimum(column_S, K - 1) // GROUP  # columns past K have no group; their x is 0
    return tl.load(scale_ptr + group_S[None, :] * N + row_N[:, None], mask=rows[:, None], other=8)


@triton.jit
def _number(byte, dtype: tl.constexpr, BITS: tl.constexpr):
    """A scale, times 2^127 or (fp16) 2^15, from its byte."""
    byte = byte.to(tl.int32)
    if BITS and dtype == tl.float16:
        s = ((byte << 7) - 0x400).to(tl.int16).to(tl.float16, bitcast=True)
    elif BITS:
        s = ((byte << 4) + 0x6F80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        s = (((byte << 4) + 0x6F80) << 16).to(tl.float32, bitcast=True)
    return s


@triton.jit
def _columns(s_NS, SCALES: tl.constexpr):
    """The columns of [N, SCALES], 4 or 8 of them, in their order."""
    BLOCK_N: tl.constexpr = s_NS.shape[0]
    even, odd = tl.split(tl.reshape(s_NS, (BLOCK_N, SCALES // 2, 2)))
    if SCALES == 4:
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        columns = (first, second, third, fourth)
    else:
        e, o = _columns(even, 4), _columns(odd, 4)
        columns = (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])  # type: ignore[assignment]
    return columns


@triton.jit
def _weights(words_Nc, scale_Nc, J: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Code times scale of plane J, exact: in ``dtype`` with BITS, else in float32."""
    HALF: tl.constexpr = BITS and dtype == tl.float16
    if ASM:
        bits_Nc = tl.inline_asm_elementwise(_placed(J, HALF), "=r,r", [words_Nc], dtype=tl.int16, is_pure=True, pack=2)
    else:
        bits_Nc = _bits(words_Nc.to(tl.int32), J)
        if HALF:
            bits_Nc = (bits_Nc & 0x8000) | ((bits_Nc & 0x1C0) << 3)
        bits_Nc = bits_Nc.to(tl.int16)
    if HALF:
        w_Nc = bits_Nc.to(tl.float16, bitcast=True) * scale_Nc
    elif BITS:
        w_Nc = (bits_Nc.to(tl.bfloat16, bitcast=True) * scale_Nc).to(tl.bfloat16)
    else:
        w_Nc = (bits_Nc.to(tl.int32) << 16).to(tl.float32, bitcast=True) * scale_Nc
    return w_Nc


@triton.constexpr_function
def _placed(j: int, half: bool) -> str:
    """PTX: element j of both 16-bit halves as bf16 or fp16 numbers; 0xea is (a AND b) OR c."""
    if j == 3:
        body = (
            "shr.b32 t, $1, 4; and.b32 p, t, 0x00c000c0; shr.b32 t, $1, 5; lop3.b32 p, t, 0x01000100, p, 0xea; "
            "shl.b32 t, $1, 1; lop3.b32 p, t, 0x80008000, p, 0xea; "
        )
    else:
        body = f"shl.b32 t, $1, {3 * j}; and.b32 p, t, 0x81c081c0; "
    if half:
        body += "and.b32 t, p, 0x01c001c0; shl.b32 t, t, 3; lop3.b32 $0, p, 0x80008000, t, 0xea; "
    else:
        body += "mov.b32 $0, p; "
    return "{ .reg .b32 t, p; " + body + "}"


@triton.jit
def dense_kernel(
    planes_ptr, scale_ptr, divisor_ptr, out_ptr, N, K,
    GROUP: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Code times (scale / divisor), in float32, rounded to the dtype of out [N, K]."""
    row_N1 = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column_1c = tl.arange(0, 32)[None, :]
    first = tl.program_id(0) * 128
    words_ptr = planes_ptr + row_N1.to(tl.int64) * (tl.cdiv(K, 128) * 32) + tl.program_id(0) * 32 + column_1c
    words_Nc = tl.load(words_ptr, mask=row_N1 < N, other=0).to(tl.int32)
    divisor_N1 = tl.load(divisor_ptr + row_N1, mask=row_N1 < N, other=1.0)
    for j in tl.static_range(4):
        k = first + 32 * j
        if GROUP % 32 == 0:  # planes past K have no group
            scale = _quotient(scale_ptr, tl.minimum(k, K - 1) // GROUP * N + row_N1, row_N1 < N, divisor_N1)
        elif GROUP % 16 == 0:
            group_12 = tl.minimum(k + 16 * tl.arange(0, 2), K - 1)[None, :] // GROUP
            scale_N2 = _quotient(scale_ptr, group_12 * N + row_N1, row_N1 < N, divisor_N1)
            scale = tl.reshape(tl.broadcast_to(scale_N2[:, :, None], (BLOCK_N, 2, 16)), (BLOCK_N, 32))
        else:
            group_1c = tl.minimum(k + column_1c, K - 1) // GROUP
            scale = _quotient(scale_ptr, group_1c * N + row_N1, row_N1 < N, divisor_N1)
        bits_Nc = _bits(words_Nc, j)
        size_Nc = ((bits_Nc & 0x1C0) << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        W_Nc = tl.where((bits_Nc & 0x8000) != 0, -size_Nc, size_Nc) * scale
        inside = (row_N1 < N) & (k + column_1c < K)
        out_Nc = rounded(W_Nc, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row_N1.to(tl.int64) * K + k + column_1c, out_Nc, mask=inside)


@triton.jit
def _quotient(scale_ptr, at, inside, divisor_N1):
    """Scales over the divisors of their rows; the byte of a scale is exponent and mantissa of a float."""
    byte = tl.load(scale_ptr + at, mask=inside, other=8).to(tl.int32)
    return tl.div_rn(((byte + (97 << 3)) << 20).to(tl.float32, bitcast=True), tl.broadcast_to(divisor_N1, byte.shape))


@triton.jit
def _bits(words_Nc, J: tl.constexpr):
    """The code of plane J at the positions of element 0."""
    if J == 3:
        bits_Nc = ((words_Nc >> 4) & 0xC0) | ((words_Nc >> 5) & 0x100) | ((words_Nc << 1) & 0x8000)
    else:
        bits_Nc = (words_Nc << (3 * J)) & 0x81C0
    return bits_Nc
