"""The Triton kernel: out^T = W X^T, group by group, so that the weight is the operand that wgmma reads from registers.

One program computes a tile of BLOCK_N features times BLOCK_M tokens. For each block of 128 columns it loads one tile of
16-bit words and, plane by plane (layout.py), turns 32 columns of codes into floats by placing their bits below a
constant exponent: 0x4300 | n is 128 + n in bf16, 0x6400 | n is 1024 + n in fp16; subtracting that constant and the zero
point is exact. On CUDA one lop3 does it for two codes.

For few tokens scales multiply the float32 sums of a group (exact codes enter the product), for many tokens the weights
(fewer registers; rounded like the dense bf16 weight).

Programs that split the columns write float32 sums, which are added in a fixed order: results are reproducible.

Shapes: M tokens, N output features, K input features, G groups; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, choose

__all__ = ["constants", "gemm", "w4a16_kernel"]


def gemm(
    x_MK: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None = None, launch: W4Launch | None = None
) -> Tensor:
    """The product x W^T [M, N] in the dtype of x; arguments as ``w4a16_gemm`` checks them, groups of 32 n columns."""
    M, K = x_MK.shape
    G, N = scale_GN.shape
    if M == 0:
        return x_MK.new_empty(0, N)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    launch = launch or choose(M, N, K, x_MK.dtype, x_MK.device, K // G)
    split = launch.split
    out = torch.empty((split, M, N), dtype=x_MK.dtype if split == 1 else torch.float32, device=x_MK.device)
    blocks = triton.cdiv(K, 128)
    grid = (triton.cdiv(N, launch.block_n), triton.cdiv(M, launch.block_m), split)
    interpreted = not isinstance(w4a16_kernel, triton.JITFunction)
    with launching(x_MK):
        w4a16_kernel[grid](
            x_MK, planes_NP, scale_GN, zero_GN, out, M, N, K, x_MK.stride(0), triton.cdiv(blocks, split),
            **constants(launch, G, K, x_MK.dtype, zero_GN is not None, interpreted),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return out[0] if split == 1 else out.sum(0).to(x_MK.dtype)


def constants(
    launch: W4Launch, groups: int, K: int, dtype: torch.dtype, asymmetric: bool, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "GROUP": 0 if groups == 1 else K // groups,
        "HAS_ZERO": asymmetric,
        "SCALE_SUMS": launch.scale_sums,
        "WHOLE": K % 128 == 0,
        "BITS": dtype == torch.float16 or (dtype == torch.bfloat16 and not interpreted),
        "ASM": not interpreted,
        "INTERPRETED": interpreted,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def w4a16_kernel(
    x_ptr, planes_ptr, scale_ptr, zero_ptr, out_ptr, M, N, K, stride_x, blocks_per_split,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, SCALE_SUMS: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GROUP columns have one scale (0: all columns of a row); BITS and ASM select how codes become floats."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2)
    column_c = tl.arange(0, 32)
    rows, tokens = row_N < N, token_M < M
    blocks = tl.cdiv(K, 128)
    PER_BLOCK: tl.constexpr = GROUP > 0 and GROUP % 128 == 0  # one group in a block of 128 columns
    PER_PLANE: tl.constexpr = GROUP > 0 and GROUP % 128 != 0

    words_ptr = planes_ptr + row_N[:, None] * (blocks * 32) + column_c[None, :]
    tokens_ptr = x_ptr + token_M[None, :] * stride_x + column_c[:, None]
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUP == 0:
        scale_N, zero_N = _grid(scale_ptr, zero_ptr, row_N, rows, HAS_ZERO)
    for b in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        words_Nc = tl.load(words_ptr + b * 32, mask=rows[:, None], other=0)
        if PER_BLOCK:
            scale_N, zero_N = _grid(scale_ptr, zero_ptr, b * 128 // GROUP * N + row_N, rows, HAS_ZERO)
            if SCALE_SUMS:
                group_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for j in tl.static_range(4):
            k = b * 128 + j * 32
            if WHOLE:
                inside = tokens[None, :]
            else:
                inside = tokens[None, :] & (k + column_c < K)[:, None]
            x_cM = tl.load(tokens_ptr + k, mask=inside, other=0.0)
            if PER_PLANE:
                group = tl.minimum(k, K - 1) // GROUP  # planes past K have no group; their x is 0
                scale_N, zero_N = _grid(scale_ptr, zero_ptr, group * N + row_N, rows, HAS_ZERO)
            w_Nc = _codes(words_Nc, 4 * j, zero_N, x_ptr.dtype.element_ty, BITS, ASM)
            if not SCALE_SUMS and GROUP != 0:
                w_Nc = (w_Nc * scale_N[:, None].to(w_Nc.dtype)).to(w_Nc.dtype)
            if INTERPRETED:  # NumPy has no bf16, and is slow in fp16
                w_Nc, x_cM = w_Nc.to(tl.float32), x_cM.to(tl.float32)
            if SCALE_SUMS and PER_BLOCK:
                group_NM = tl.dot(w_Nc, x_cM, group_NM, input_precision="tf32x3")
            elif SCALE_SUMS and PER_PLANE:
                sums_NM += tl.dot(w_Nc, x_cM, input_precision="tf32x3") * scale_N[:, None].to(tl.float32)
            else:
                sums_NM = tl.dot(w_Nc, x_cM, sums_NM, input_precision="tf32x3")
        if SCALE_SUMS and PER_BLOCK:
            sums_NM += group_NM * scale_N[:, None].to(tl.float32)
    if GROUP == 0:
        sums_NM *= scale_N[:, None].to(tl.float32)
    out_NM = out_ptr + (split.to(tl.int64) * M + token_M[None, :]) * N + row_N[:, None]
    tl.store(out_NM, sums_NM.to(out_ptr.dtype.element_ty), mask=rows[:, None] & tokens[None, :])


@triton.jit
def _grid(scale_ptr, zero_ptr, at_N, rows, HAS_ZERO: tl.constexpr):
    """Scale of the rows of a tile, and their zero point in float32."""
    scale_N = tl.load(scale_ptr + at_N, mask=rows, other=0.0)
    if HAS_ZERO:
        zero_N = tl.load(zero_ptr + at_N, mask=rows, other=8).to(tl.float32)
    else:
        zero_N = tl.full(at_N.shape, 8, tl.float32)
    return scale_N, zero_N


@triton.jit
def _codes(words_Nc, SHIFT: tl.constexpr, zero_N, dtype: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Code - zero point, exact: in ``dtype`` with BITS, else in float32."""
    if BITS:
        BASE: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        EXPONENT: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        if ASM:
            bits_Nc = tl.inline_asm_elementwise(
                _place_bits(SHIFT, EXPONENT), "=r,r", [words_Nc], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            bits_Nc = (((words_Nc >> SHIFT) & 15) | EXPONENT).to(tl.int16)
        codes_Nc = bits_Nc.to(dtype, bitcast=True) - (zero_N + BASE).to(dtype)[:, None]
    else:
        codes_Nc = ((words_Nc.to(tl.int32) >> SHIFT) & 15).to(tl.float32) - zero_N[:, None]
    return codes_Nc


@triton.constexpr_function
def _place_bits(shift: int, exponent: int) -> str:
    """PTX: nibble ``shift / 4`` of both 16-bit halves, below the exponent; 0xea is (a AND b) OR c."""
    both = exponent << 16 | exponent
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; lop3.b32 $0, t, 0x000f000f, {both:#010x}, 0xea; }}"
