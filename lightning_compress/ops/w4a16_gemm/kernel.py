"""The Triton kernel: out^T = W X^T, group by group, so that the weight is the operand that wgmma reads from registers.

One program computes a tile of BLOCK_N features times BLOCK_M tokens. For each block of 128 columns it loads one tile of
16-bit words and, plane by plane (layout.py), turns 32 columns of codes into floats by placing their bits below a
constant exponent: 0x4300 | n is 128 + n in bf16, 0x6400 | n is 1024 + n in fp16; subtracting that constant and the zero
point is exact. On CUDA one lop3 does it for two codes.

For few tokens scales multiply the float32 sums of a group (exact codes enter the product), for many tokens the weights
(fewer registers; rounded like the dense bf16 weight).

The scales and zero points of a block are loaded one block ahead, since the first product of a block needs them; words
and tokens are copied to shared memory several blocks ahead (stages of launch.py).

Shapes: M tokens, N output features, K input features, G groups; runs under Triton 3.6 to 3.9.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching
from lightning_compress.ops.prepared import PreparedKernel
from lightning_compress.ops.split_sums import store_sums, workspace
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, choose

__all__ = ["constants", "dense", "dense_kernel", "gemm", "load_words", "prepare", "rounded", "split_product",
           "w4a16_kernel"]  # fmt: skip

DENSE_ROWS = 64  # of a program of dense_kernel


def gemm(
    x_MK: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None = None, launch: W4Launch | None = None
) -> Tensor:
    """The product x W^T [M, N] in the dtype of x; arguments as ``w4a16_gemm`` checks them, groups of 32 n columns."""
    if not len(x_MK):
        return x_MK.new_empty(0, scale_GN.shape[1])
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    return prepare(x_MK, planes_NP, scale_GN, zero_GN, launch)(x_MK)


def prepare(
    x: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None = None, launch: W4Launch | None = None
) -> Callable[[Tensor], Tensor]:
    """The product as a function of x, for others of the same ``call_key``: [M, K], or contiguous [..., K]."""
    K, (G, N) = x.shape[-1], scale_GN.shape
    launch = launch or choose(x.numel() // K, N, K, x.dtype, x.device, K // G)
    interpreted = not isinstance(w4a16_kernel, triton.JITFunction)
    fixed = constants(launch, G, K, x.dtype, zero_GN is not None, interpreted)
    numbers = x.numel() // K, N, K, x.stride(-2) if x.ndim > 1 else K
    weight = planes_NP, scale_GN, zero_GN
    return split_product(w4a16_kernel, weight, (*x.shape[:-1], N), x.dtype, launch, fixed, numbers)


def split_product(
    kernel: Any, weight: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype, launch: W4Launch,
    fixed: Mapping[str, Any], numbers: Sequence[int],
) -> Callable[..., Tensor]:  # fmt: skip
    """A kernel whose programs share the sums of split columns (split_sums.py), as a function of the tokens' operands.

    Args:
        kernel: It takes the operands of tokens, ``weight``, out, parts and counters, and ``numbers``.
        weight: The operands of the weight.
        shape: That of the product, [..., N].
        dtype: That of the product.
        launch: Tiles, split, warps and stages.
        fixed: Compile-time arguments of the kernel.
        numbers: Integers, M and N first.
    """
    (M, N), split = numbers[:2], launch.split
    grid = (triton.cdiv(N, launch.block_n), triton.cdiv(M, launch.block_m), split)
    tiles = grid[0] * grid[1]
    prepared = PreparedKernel(kernel, grid, fixed, num_warps=launch.warps, num_stages=launch.stages)

    def product(*tokens: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=tokens[0].device)
        with launching(out):
            parts, counters = workspace(out, M, N, split, tiles)
            prepared(*tokens, *weight, out, parts, counters, *numbers)
        return out

    return product


def dense(
    planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None, K: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """W [N, K] in ``dtype``: one launch, which writes each weight and reads half a byte of it; any group size."""
    G, N = scale_GN.shape
    W_NK = torch.empty((N, K), dtype=dtype, device=planes_NP.device)
    interpreted = not isinstance(dense_kernel, triton.JITFunction)
    if N and K:
        with launching(planes_NP):
            dense_kernel[(triton.cdiv(K, 128), triton.cdiv(N, DENSE_ROWS))](
                planes_NP, scale_GN, zero_GN, W_NK, N, K, GROUP=0 if G == 1 else K // G, HAS_ZERO=zero_GN is not None,
                INTERPRETED=interpreted, BLOCK_N=DENSE_ROWS,
            )  # fmt: skip
    return W_NK


def constants(
    launch: W4Launch, groups: int, K: int, dtype: torch.dtype, asymmetric: bool, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "GROUP": 0 if groups == 1 else K // groups,
        "HAS_ZERO": asymmetric,
        "SCALE_SUMS": launch.scale_sums,
        "WHOLE": K % 128 == 0,
        "SPLIT": launch.split,
        "BITS": dtype == torch.float16 or (dtype == torch.bfloat16 and not interpreted),
        "ASM": not interpreted,
        "INTERPRETED": interpreted,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def w4a16_kernel(
    x_ptr, planes_ptr, scale_ptr, zero_ptr, out_ptr, parts_ptr, counter_ptr, M, N, K, stride_x,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, SCALE_SUMS: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    BITS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GROUP columns have one scale (0: all columns of a row); BITS and ASM select how codes become floats."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_N = tl.minimum(row_N, N - 1)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column_c = tl.arange(0, 32)
    rows, tokens = row_N < N, token_M < M
    blocks = tl.cdiv(K, 128)
    first = tl.program_id(2) * tl.cdiv(blocks, SPLIT)
    end = tl.minimum(first + tl.cdiv(blocks, SPLIT), blocks)
    PER_PLANE: tl.constexpr = GROUP > 0 and GROUP % 128 != 0
    PER_BLOCK: tl.constexpr = GROUP > 0 and not PER_PLANE  # one group in a block of 128 columns

    words_ptr = planes_ptr + row_N[:, None] * (blocks * 32) + column_c[None, :]
    tokens_ptr = x_ptr + token_M[None, :] * stride_x + column_c[:, None]
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ahead = _grids(scale_ptr, zero_ptr, first, blocks, K, N, grid_N, rows, GROUP, HAS_ZERO, ASM)
    for b in range(first, end):
        grids = ahead
        if GROUP != 0:  # in front of the barrier of the words, below which ptxas would move it
            ahead = _grids(scale_ptr, zero_ptr, b + 1, blocks, K, N, grid_N, rows, GROUP, HAS_ZERO, ASM)
        words_Nc = tl.load(words_ptr + b * 32, mask=rows[:, None], other=0)
        if SCALE_SUMS and PER_BLOCK:
            group_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for j in tl.static_range(4):
            k = b * 128 + j * 32
            if WHOLE:
                inside = tokens[None, :]
            else:
                inside = tokens[None, :] & (k + column_c < K)[:, None]
            x_cM = tl.load(tokens_ptr + k, mask=inside, other=0.0)
            scale_N = as_floats(grids[2 * j if PER_PLANE else 0], scale_ptr.dtype.element_ty)
            zero_N = grids[2 * j + 1 if PER_PLANE else 1]
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
            sums_NM += group_NM * as_floats(grids[0], scale_ptr.dtype.element_ty)[:, None].to(tl.float32)
    if GROUP == 0:
        sums_NM *= as_floats(ahead[0], scale_ptr.dtype.element_ty)[:, None].to(tl.float32)
    store_sums(sums_NM, out_ptr, parts_ptr, counter_ptr, M, N, row_N, token_M, SPLIT)


@triton.jit
def _grids(
    scale_ptr, zero_ptr, b, blocks, K, N, grid_N, rows, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Scale and zero point of the rows of a tile in block b, or in each of its four planes."""
    b = tl.minimum(b, blocks - 1)  # the loop looks one block too far
    if GROUP == 0:
        grids = _grid(scale_ptr, zero_ptr, grid_N, rows, HAS_ZERO, ASM)
    elif GROUP % 128 == 0:
        grids = _grid(scale_ptr, zero_ptr, b // (GROUP // 128) * N + grid_N, rows, HAS_ZERO, ASM)
    else:  # planes past K have no group; their x is 0
        grids = ()
        for j in tl.static_range(4):
            group = tl.minimum(b * 128 + 32 * j, K - 1) // GROUP
            grids += _grid(scale_ptr, zero_ptr, group * N + grid_N, rows, HAS_ZERO, ASM)
    return grids


@triton.jit
def _grid(scale_ptr, zero_ptr, at_N, rows, HAS_ZERO: tl.constexpr, ASM: tl.constexpr):
    """Scale of the rows of a tile, and their zero point."""
    scale_N = load_words(scale_ptr + at_N, rows, ASM)
    if HAS_ZERO:
        zero_N = load_words(zero_ptr + at_N, rows, ASM)
    else:
        zero_N = tl.full(at_N.shape, 8, tl.float32)
    return scale_N, zero_N


@triton.jit
def load_words(ptr_N, rows, ASM: tl.constexpr):
    """Numbers of 8 or 16 bits in a register each, as they come from memory; all rows must be readable with ASM.

    Else the compiler packs two of them into a register right after the load, and waits for memory there.
    """
    if ASM and ptr_N.dtype.element_ty.primitive_bitwidth <= 16:
        CODE: tl.constexpr = _load_word(ptr_N.dtype.element_ty.primitive_bitwidth)
        words_N = tl.inline_asm_elementwise(CODE, "=r,l", [ptr_N.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        words_N = tl.load(ptr_N, mask=rows, other=0)
    return words_N


@triton.jit
def as_floats(words_N, dtype: tl.constexpr):
    """The numbers of ``dtype`` in what :func:`load_words` gives."""
    return words_N.to(tl.int16).to(dtype, bitcast=True) if words_N.dtype == tl.int32 else words_N


@triton.constexpr_function
def _load_word(bits: int) -> str:
    """PTX: the register of a load may be wider than the number."""
    return f"ld.global.u{bits} $0, [$1];"


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
        if zero_N.dtype == tl.float32:
            base_N = (zero_N + BASE).to(dtype)
        else:
            base_N = (zero_N.to(tl.int32) | EXPONENT).to(tl.int16).to(dtype, bitcast=True)
        codes_Nc = bits_Nc.to(dtype, bitcast=True) - base_N[:, None]
    else:
        codes_Nc = ((words_Nc.to(tl.int32) >> SHIFT) & 15).to(tl.float32) - zero_N.to(tl.float32)[:, None]
    return codes_Nc


@triton.constexpr_function
def _place_bits(shift: int, exponent: int) -> str:
    """PTX: nibble ``shift / 4`` of both 16-bit halves, below the exponent; 0xea is (a AND b) OR c."""
    both = exponent << 16 | exponent
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; lop3.b32 $0, t, 0x000f000f, {both:#010x}, 0xea; }}"


@triton.jit
def dense_kernel(
    planes_ptr, scale_ptr, zero_ptr, out_ptr, N, K,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(code - zero point) times scale, in float32, rounded to the dtype of out [N, K]."""
    row_N1 = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column_1c = tl.arange(0, 32)[None, :]
    first = tl.program_id(0) * 128
    words_ptr = planes_ptr + row_N1.to(tl.int64) * (tl.cdiv(K, 128) * 32) + tl.program_id(0) * 32 + column_1c
    words_Nc = tl.load(words_ptr, mask=row_N1 < N, other=0).to(tl.int32)
    for j in tl.static_range(4):
        k_1c = first + 32 * j + column_1c
        if GROUP == 0:
            at = row_N1
        elif GROUP % 32 == 0:  # planes past K have no group
            at = tl.minimum(first + 32 * j, K - 1) // GROUP * N + row_N1
        else:
            at = tl.minimum(k_1c, K - 1) // GROUP * N + row_N1
        scale = tl.load(scale_ptr + at, mask=row_N1 < N, other=0.0).to(tl.float32)
        codes_Nc = (words_Nc >> (4 * j)) & 15
        if HAS_ZERO:
            codes_Nc -= tl.load(zero_ptr + at, mask=row_N1 < N, other=8).to(tl.int32)
        else:
            codes_Nc -= 8
        W_Nc = rounded(codes_Nc.to(tl.float32) * scale, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row_N1.to(tl.int64) * K + k_1c, W_Nc, mask=(row_N1 < N) & (k_1c < K))


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, float32 and finite, rounded to nearest in ``dtype``; the interpreter's own cast to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
