"""The Triton kernel: extremes, all factors, shifts and the fit for a few lines, from one pass over W.

The matrix is treated as lines of the columns that share one scale. Lines of up to 1024 columns stay in registers as
t = w / s; of longer ones every evaluation reads 1024 columns at a time, from L2. Factors are multiplied in float64, as
Python does; errors are float32 and not contracted, so results differ from the reference's by the order of sums only.

Shapes: L lines of g columns, G lines to a row; blocks of BLOCK_L lines, BLOCK_C columns; Triton 3.6 to 3.9.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fake_quant.kernel import clamp, round_code
from lightning_compress.ops.group_quant.kernel import load_lines, qparams, stored
from lightning_compress.ops.group_quant.reference import limits
from lightning_compress.ops.launches import launching
from lightning_compress.ops.scale_search.reference import LOWEST, PATIENCE, RATIO, first_factor, roots

__all__ = ["WARPS", "constants", "numbers", "scale_search", "scale_search_kernel"]

WARPS = 4


def scale_search(
    W_NK: Tensor, h_K: Tensor, group: int, bits: int, symmetric: bool, float8: bool, power: float
) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] and zero point int8 [N, G] or None; arguments as ``scale_search`` checks them."""
    W_NK, h_K = W_NK.contiguous(), h_K.contiguous()
    N, G = len(W_NK), W_NK.shape[1] // group
    scale_NG = torch.empty((N, G), dtype=W_NK.dtype, device=W_NK.device)
    zero_NG = None if symmetric else torch.empty((N, G), dtype=torch.int8, device=W_NK.device)
    interpreted = not isinstance(scale_search_kernel, triton.JITFunction)
    fixed = constants(group, symmetric, float8, power, interpreted)
    with launching(W_NK):
        scale_search_kernel[(triton.cdiv(N * G, fixed["BLOCK_L"]),)](
            W_NK, h_K, scale_NG, zero_NG, N * G, group, G, *numbers(bits, float8, power, W_NK.dtype), **fixed,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return scale_NG, zero_NG


def constants(
    group: int, symmetric: bool, float8: bool, power: float, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments: tiles of 2048 numbers, 16 for each thread; of a long line 1024."""
    block_c = max(16, min(triton.next_power_of_2(group), 1024))
    return {
        "SYMMETRIC": symmetric,
        "FLOAT8": float8,
        "SQUARE": power == 2,
        "ROOTS": len(roots(power)),
        "PATIENCE": PATIENCE,
        "ONCE": group <= block_c,
        "INTERPRETED": interpreted,
        "BLOCK_L": 2048 // block_c if group <= block_c else 1,
        "BLOCK_C": block_c,
    }


def numbers(bits: int, float8: bool, power: float, dtype: torch.dtype) -> tuple[float | int, ...]:
    """The grid, p, the first factor and the ratio, each as a sum of two float32 numbers, and how many factors."""
    low, high = limits(bits, float8)
    f, ratio, tries = first_factor(low, high), RATIO[bits], 0
    halves = [part for v in (f, ratio) for part in (_float32(v), _float32(v - _float32(v)))]
    while f > LOWEST[bits]:
        f, tries = f * ratio, tries + 1
    return low, high, torch.finfo(dtype).eps, power, *halves, ratio ** (1 / 2), ratio ** (1 / 4), tries


def _float32(v: float) -> float:
    return float(struct.unpack("f", struct.pack("f", v))[0])


@triton.jit
def scale_search_kernel(
    w_ptr, h_ptr, scale_ptr, zero_ptr, L, g, G, low, high, eps, power,
    first, first_rest, ratio, ratio_rest, root2, root4, tries,
    SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, SQUARE: tl.constexpr, ROOTS: tl.constexpr, PATIENCE: tl.constexpr,
    ONCE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ONCE: a line fits into one tile; tries: the number of factors above the lowest."""
    line_L = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    w_LC = load_lines(w_ptr, line_L, 0, L, g, BLOCK_C)
    lowest_LC, highest_LC = tl.minimum(w_LC, 0.0), tl.maximum(w_LC, 0.0)
    if not ONCE:
        for c in range(BLOCK_C, g, BLOCK_C):
            more_LC = load_lines(w_ptr, line_L, c, L, g, BLOCK_C)
            lowest_LC, highest_LC = tl.minimum(lowest_LC, more_LC), tl.maximum(highest_LC, more_LC)
    s_L, z_L = qparams(tl.min(lowest_LC, 1), tl.max(highest_LC, 1), low, high, eps, dtype, SYMMETRIC, INTERPRETED)
    t_LC, h_LC = _tile(w_ptr, h_ptr, s_L, line_L, 0, L, g, G, dtype, INTERPRETED, BLOCK_C)

    one_L = tl.full((BLOCK_L,), 1.0, tl.float32)
    d_L = one_L * 0.0
    best_L, f_L = _walk(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, z_L, low, high, power, first, first_rest, ratio,
                        ratio_rest, tries, dtype, SYMMETRIC, FLOAT8, SQUARE, PATIENCE, ONCE, INTERPRETED, BLOCK_L,
                        BLOCK_C)  # fmt: skip
    middle_L = f_L
    for k in range(2 * ROOTS):
        root = tl.where(k < 2, root2, root4)
        middle_L = tl.where(k % 2 == 0, f_L, middle_L)
        n_L = tl.where(k % 2 == 0, middle_L * root, tl.div_rn(middle_L, one_L * root))
        e_L = _errors(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, n_L, tl.div_rn(one_L, n_L), z_L, low, high, power,
                      dtype, SYMMETRIC, FLOAT8, SQUARE, ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
        f_L, best_L = tl.where(e_L < best_L, n_L, f_L), tl.minimum(e_L, best_L)
    if not SYMMETRIC:
        for k in range(2):
            n_L = z_L + tl.where(k == 0, -1.0, 1.0)
            e_L = _errors(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, f_L, tl.div_rn(one_L, f_L), n_L, low, high,
                          power, dtype, SYMMETRIC, FLOAT8, SQUARE, ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
            better_L = (e_L < best_L) & (n_L >= low) & (n_L <= high)
            d_L, best_L = tl.where(better_L, n_L - z_L, d_L), tl.where(better_L, e_L, best_L)
    if SQUARE:
        n_L = _fit(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, f_L, z_L + d_L, low, high, dtype, SYMMETRIC, FLOAT8,
                   ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
        e_L = _errors(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, n_L, tl.div_rn(one_L, n_L), z_L + d_L, low, high,
                      power, dtype, SYMMETRIC, FLOAT8, SQUARE, ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
        f_L = tl.where(e_L < best_L, n_L, f_L)

    found_L = stored(s_L * f_L, dtype, INTERPRETED)
    found_L = tl.where((found_L > 0) & (found_L < float("inf")), found_L, s_L)
    tl.store(scale_ptr + line_L, found_L.to(dtype), mask=line_L < L)
    if not SYMMETRIC:
        tl.store(zero_ptr + line_L, (z_L + d_L).to(tl.int8), mask=line_L < L)


@triton.jit
def _tile(
    w_ptr, h_ptr, s_L, line_L, c, L, g, G, dtype: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """t and h of some lines from column c on; 0 past the end."""
    w_LC = load_lines(w_ptr, line_L, c, L, g, BLOCK_C)
    t_LC = stored(tl.div_rn(w_LC, tl.broadcast_to(s_L[:, None], w_LC.shape)), dtype, INTERPRETED)
    column_C = c + tl.arange(0, BLOCK_C)
    inside_LC = (line_L < L)[:, None] & (column_C < g)[None, :]
    return t_LC, tl.load(h_ptr + ((line_L % G) * g)[:, None] + column_C[None, :], mask=inside_LC, other=0.0)


@triton.jit
def _walk(
    t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, z_L, low, high, power, first, first_rest, ratio, ratio_rest, tries,
    dtype: tl.constexpr, SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, SQUARE: tl.constexpr, PATIENCE: tl.constexpr,
    ONCE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The least error of each line and its factor: every line tries 1 and ``tries`` factors, then on while errors fall.

    A line goes on while one of its last PATIENCE factors was better.
    """
    one_L = tl.full((BLOCK_L,), 1.0, tl.float32)
    f_L = one_L
    best_L = _errors(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, one_L, one_L, z_L, low, high, power, dtype,
                     SYMMETRIC, FLOAT8, SQUARE, ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
    step = tl.full([], ratio, tl.float64) + tl.full([], ratio_rest, tl.float64)
    f = tl.full([], first, tl.float64) + tl.full([], first_rest, tl.float64)
    patience_L = tl.full((BLOCK_L,), PATIENCE, tl.int32)
    tried = 0
    while (tl.max(patience_L, 0) > 0) & (f > 1.1920928955078125e-07):
        f32, inverse = f.to(tl.float32), (1.0 / f).to(tl.float32)
        e_L = _errors(t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, one_L * f32, one_L * inverse, z_L, low, high,
                      power, dtype, SYMMETRIC, FLOAT8, SQUARE, ONCE, INTERPRETED, BLOCK_C)  # fmt: skip
        better_L = (e_L < best_L) & (patience_L > 0)
        best_L, f_L = tl.where(better_L, e_L, best_L), tl.where(better_L, f32, f_L)
        tried += 1
        spent_L = tl.where(tried < tries, PATIENCE, tl.where(tried == tries, 0, patience_L - 1))
        patience_L = tl.where(better_L, PATIENCE, spent_L)
        f = f * step
    return best_L, f_L


@triton.jit
def _codes(t_LC, inverse_L, z_L, low, high, SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr):
    v_LC = t_LC * inverse_L[:, None]
    if SYMMETRIC:
        q_LC = round_code(clamp(v_LC, low, high), FLOAT8)
    else:
        q_LC = round_code(clamp(v_LC + z_L[:, None], low, high), FLOAT8) - z_L[:, None]
    return q_LC


@triton.jit
def _lost(
    t_LC, h_LC, f_L, inverse_L, z_L, low, high, power,
    SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    e_LC = _codes(t_LC, inverse_L, z_L, low, high, SYMMETRIC, FLOAT8) * f_L[:, None] - t_LC
    if SQUARE:
        lost_LC = h_LC * (e_LC * e_LC)
    else:  # log2 of 0 is -inf, whose power is 0
        lost_LC = h_LC * tl.exp2(power * tl.log2(tl.abs(e_LC)))
    return lost_LC


@triton.jit
def _errors(
    t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, f_L, inverse_L, z_L, low, high, power, dtype: tl.constexpr,
    SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, SQUARE: tl.constexpr, ONCE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_j h_j |e_j|^p of each line; t and h are those of the first tile."""
    sums_LC = _lost(t_LC, h_LC, f_L, inverse_L, z_L, low, high, power, SYMMETRIC, FLOAT8, SQUARE)
    if not ONCE:
        for c in range(BLOCK_C, g, BLOCK_C):
            more_LC, heavy_LC = _tile(w_ptr, h_ptr, s_L, line_L, c, L, g, G, dtype, INTERPRETED, BLOCK_C)
            sums_LC += _lost(more_LC, heavy_LC, f_L, inverse_L, z_L, low, high, power, SYMMETRIC, FLOAT8, SQUARE)
    return tl.sum(sums_LC, 1)


@triton.jit
def _fit(
    t_LC, h_LC, w_ptr, h_ptr, s_L, line_L, L, g, G, f_L, z_L, low, high, dtype: tl.constexpr,
    SYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, ONCE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The best factor for the codes of these factors: sum_j h_j t_j c_j / sum_j h_j c_j^2."""
    inverse_L = tl.div_rn(f_L * 0.0 + 1.0, f_L)
    q_LC = _codes(t_LC, inverse_L, z_L, low, high, SYMMETRIC, FLOAT8)
    above_LC, below_LC = h_LC * (t_LC * q_LC), h_LC * (q_LC * q_LC)
    if not ONCE:
        for c in range(BLOCK_C, g, BLOCK_C):
            more_LC, heavy_LC = _tile(w_ptr, h_ptr, s_L, line_L, c, L, g, G, dtype, INTERPRETED, BLOCK_C)
            q_LC = _codes(more_LC, inverse_L, z_L, low, high, SYMMETRIC, FLOAT8)
            above_LC += heavy_LC * (more_LC * q_LC)
            below_LC += heavy_LC * (q_LC * q_LC)
    above_L, below_L = tl.sum(above_LC, 1), tl.sum(below_LC, 1)
    fits_L = (above_L > 0) & (below_L > 0)
    return tl.where(fits_L, tl.div_rn(above_L, tl.where(fits_L, below_L, 1.0)), f_L)
