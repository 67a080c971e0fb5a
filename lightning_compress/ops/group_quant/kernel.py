"""The Triton kernel: extremes, scale, zero point, codes, and words or values, from one pass over W.

The matrix is treated as lines of the columns that share one scale. A program processes a few lines, up to 1024 columns
of each at a time; longer lines are read twice, the second time from L2. Scales are rounded step by step to the dtype
that stores them, once for each line. Rounding needs no conversion instruction (see fake_quant/kernel.py).

Shapes: L lines of g columns, P = ceil(g bits / 32) words; blocks of BLOCK_L lines, BLOCK_C columns; Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fake_quant.kernel import clamp, round_code
from lightning_compress.ops.group_quant.reference import limits
from lightning_compress.ops.launches import launching
from lightning_compress.ops.pack.kernel import pack_quads

__all__ = ["WARPS", "constants", "group_quant", "group_quant_kernel", "load_lines", "qparams", "stored"]

WARPS = 4


def group_quant(
    W_NK: Tensor, group: int, bits: int, symmetric: bool, float8: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words int32 [N, P] or values [N, K], scale [N, G] and zero point int8 [N, G] or None; equal to the reference.

    Arguments as ``group_quant`` and ``group_round`` check them; with ``packed`` the group is a multiple of 32, or K.
    """
    W_NK = W_NK.contiguous()
    (N, K), device = W_NK.shape, W_NK.device
    G, P = K // group, triton.cdiv(group * bits, 32)
    shape, dtype = ((N, G * P), torch.int32) if packed else ((N, K), W_NK.dtype)
    out = torch.empty(shape, dtype=dtype, device=device)
    scale_NG = torch.empty((N, G), dtype=W_NK.dtype, device=device)
    zero_NG = None if symmetric else torch.empty((N, G), dtype=torch.int8, device=device)
    interpreted = not isinstance(group_quant_kernel, triton.JITFunction)
    fixed = constants(group, bits, symmetric, float8, packed, interpreted)
    with launching(W_NK):
        group_quant_kernel[(triton.cdiv(N * G, fixed["BLOCK_L"]),)](
            W_NK, out, scale_NG, zero_NG, N * G, group, P, *limits(bits, float8), torch.finfo(W_NK.dtype).eps, **fixed,
            num_warps=WARPS,
        )  # fmt: skip
    return out, scale_NG, zero_NG


def constants(
    group: int, bits: int, symmetric: bool, float8: bool, packed: bool, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments: tiles of 2048 numbers, 16 for each thread."""
    block_c = max(32, min(triton.next_power_of_2(group), 1024))
    return {
        "BITS": bits,
        "WORDS": triton.next_power_of_2(bits),
        "SYMMETRIC": symmetric,
        "FLOAT8": float8,
        "PACKED": packed,
        "ONCE": group <= block_c,
        "INTERPRETED": interpreted,
        "BLOCK_L": 2048 // block_c,
        "BLOCK_C": block_c,
    }


@triton.jit
def group_quant_kernel(
    w_ptr, out_ptr, scale_ptr, zero_ptr, L, g, P, low, high, eps,
    BITS: tl.constexpr, WORDS: tl.constexpr, SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, PACKED: tl.constexpr,
    ONCE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ONCE: a line fits into one tile."""
    line_L = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    w_LC = load_lines(w_ptr, line_L, 0, L, g, BLOCK_C)
    lowest_LC, highest_LC = tl.minimum(w_LC, 0.0), tl.maximum(w_LC, 0.0)
    if not ONCE:
        for c in range(BLOCK_C, g, BLOCK_C):
            more_LC = load_lines(w_ptr, line_L, c, L, g, BLOCK_C)
            lowest_LC, highest_LC = tl.minimum(lowest_LC, more_LC), tl.maximum(highest_LC, more_LC)
    s_L, z_L = qparams(
        tl.min(lowest_LC, 1), tl.max(highest_LC, 1), low, high, eps, scale_ptr.dtype.element_ty, SYMMETRIC, INTERPRETED
    )
    tl.store(scale_ptr + line_L, s_L.to(scale_ptr.dtype.element_ty), mask=line_L < L)
    if not SYMMETRIC:
        tl.store(zero_ptr + line_L, z_L.to(tl.int8), mask=line_L < L)
    if ONCE:
        _store(w_LC, s_L, z_L, out_ptr, line_L, 0, L, g, P, low, high, BITS, WORDS, FLOAT8, PACKED, INTERPRETED,
             BLOCK_L, BLOCK_C)  # fmt: skip
    else:
        for c in range(0, g, BLOCK_C):
            w_LC = load_lines(w_ptr, line_L, c, L, g, BLOCK_C)
            _store(w_LC, s_L, z_L, out_ptr, line_L, c, L, g, P, low, high, BITS, WORDS, FLOAT8, PACKED, INTERPRETED,
                 BLOCK_L, BLOCK_C)  # fmt: skip


@triton.jit
def load_lines(w_ptr, line_L, c, L, g, BLOCK_C: tl.constexpr):
    """Numbers of some lines from column c on, float32; 0 past the end."""
    column_C = c + tl.arange(0, BLOCK_C)
    inside_LC = (line_L < L)[:, None] & (column_C < g)[None, :]
    return tl.load(w_ptr + line_L[:, None] * g + column_C[None, :], mask=inside_LC, other=0.0).to(tl.float32)


@triton.jit
def qparams(
    a_L, b_L, low, high, eps, dtype: tl.constexpr, SYMMETRIC: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Scale and zero point, in float32, exact in ``dtype`` and int8."""
    if SYMMETRIC:
        s_L = stored(_divided(tl.maximum(-a_L, b_L), (high - low) / 2), dtype, INTERPRETED)
        z_L = tl.zeros(s_L.shape, tl.float32)
    else:
        s_L = stored(_divided(stored(b_L - a_L, dtype, INTERPRETED), high - low), dtype, INTERPRETED)
        z_L = stored(low - stored(tl.div_rn(a_L, s_L), dtype, INTERPRETED), dtype, INTERPRETED)
        z_L = tl.where((a_L == 0) & (b_L == 0), 0.0, round_code(tl.minimum(tl.maximum(z_L, low), high), False))
    return tl.where(s_L == 0, eps, s_L), z_L


@triton.jit
def _divided(x_L, y):
    return tl.div_rn(x_L, tl.zeros(x_L.shape, tl.float32) + y)


@triton.jit
def stored(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, float32, rounded to nearest in ``dtype``; the interpreter's own cast to bf16 truncates."""
    if dtype == tl.float32:
        rounded = x
    elif dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        rounded = tl.where(x == x, rounded, x)
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def _store(
    w_LC, s_L, z_L, out_ptr, line_L, c, L, g, P, low, high,
    BITS: tl.constexpr, WORDS: tl.constexpr, FLOAT8: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Round a tile, and write its words or its values."""
    column_C = c + tl.arange(0, BLOCK_C)
    v_LC = tl.div_rn(w_LC, tl.broadcast_to(s_L[:, None], w_LC.shape)) + z_L[:, None]
    q_LC = round_code(clamp(v_LC, low, high), FLOAT8)
    if PACKED:
        u_LC = tl.where((column_C < g)[None, :], q_LC.to(tl.int32) + (1 << (BITS - 1)), 0)
        BLOCK: tl.constexpr = BLOCK_L * (BLOCK_C // 32)
        words_Bw = pack_quads(tl.reshape(u_LC, (BLOCK, 32)), BITS, WORDS, BLOCK)
        words_LBw = tl.reshape(words_Bw, (BLOCK_L, BLOCK_C // 32, WORDS))
        word_w = tl.arange(0, WORDS)
        at_Bw = (c // 32 + tl.arange(0, BLOCK_C // 32))[:, None] * BITS + word_w[None, :]
        inside_Bw = (at_Bw < P) & (word_w < BITS)[None, :]
        at_LBw = line_L[:, None, None] * P + at_Bw[None, :, :]
        tl.store(out_ptr + at_LBw, words_LBw, mask=(line_L < L)[:, None, None] & inside_Bw[None, :, :])
    else:
        inside_LC = (line_L < L)[:, None] & (column_C < g)[None, :]
        w_LC = stored((q_LC - z_L[:, None]) * s_L[:, None], out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + line_L[:, None] * g + column_C[None, :], w_LC.to(out_ptr.dtype.element_ty), mask=inside_LC)
