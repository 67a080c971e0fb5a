"""The Triton kernel for scales of a format of their own: of those near a scale, the one with the least error.

A program processes lines of the 16 or 32 columns that share a scale, 2048 numbers, 16 in each thread; they stay in
registers for all candidates. Candidates are made as in the reference: codes of E4M3, or powers of two.

Shapes: L lines of g columns, G lines to a row; blocks of BLOCK_L lines, BLOCK_C columns; Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fake_quant.kernel import clamp
from lightning_compress.ops.gptq_block.grid import EXPONENT, LARGEST, MANTISSA
from lightning_compress.ops.group_quant.kernel import load_lines
from lightning_compress.ops.launches import launching
from lightning_compress.ops.scale_search.reference import CODES, LARGEST_CODE, scale_codes

__all__ = ["WARPS", "constants", "scale_sweep", "scale_sweep_kernel"]

WARPS = 4


def scale_sweep(
    W_NK: Tensor, scale_NG: Tensor, h_K: Tensor, bits: int, global_scale: Tensor | None, power: float
) -> Tensor:
    """Scales [N, G], float32; arguments as ``scale_sweep`` of the package checks them."""
    W_NK, scale_NG, h_K = W_NK.contiguous(), scale_NG.contiguous(), h_K.contiguous()
    G = scale_NG.shape[1]
    code_NG = None if global_scale is None else scale_codes(scale_NG, global_scale)
    out_NG = torch.empty_like(scale_NG)
    fixed = constants(W_NK.shape[1] // G, bits, power, global_scale is not None)
    with launching(W_NK):
        scale_sweep_kernel[(triton.cdiv(scale_NG.numel(), fixed["BLOCK_L"]),)](
            W_NK, scale_NG, code_NG, h_K, global_scale, out_NG, scale_NG.numel(), W_NK.shape[1] // G, G, float(power),
            **fixed, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out_NG


def constants(group: int, bits: int, power: float, e4m3: bool) -> dict[str, int | float | bool]:
    """The compile-time arguments; ``e4m3``: scales are codes of E4M3 over a global scale, else powers of two."""
    block_c = triton.next_power_of_2(group)
    return {
        "LARGEST": LARGEST[bits],
        "LEAST": 2.0 ** EXPONENT[bits],
        "BASE": 1.5 * 2.0 ** (23 - MANTISSA[bits]),
        "E4M3": e4m3,
        "FIRST": CODES[0],
        "TRIES": len(CODES) if e4m3 else 3,
        "LARGEST_CODE": LARGEST_CODE,
        "SQUARE": power == 2,
        "BLOCK_L": max(1, 2048 // block_c),
        "BLOCK_C": block_c,
    }


@triton.jit
def scale_sweep_kernel(
    w_ptr, scale_ptr, code_ptr, h_ptr, global_ptr, out_ptr, L, g, G, power,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, BASE: tl.constexpr, E4M3: tl.constexpr, FIRST: tl.constexpr,
    TRIES: tl.constexpr, LARGEST_CODE: tl.constexpr, SQUARE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """TRIES: the number of candidates; the scale itself is the first to be tried."""
    line_L = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    column_C = tl.arange(0, BLOCK_C)
    w_LC = load_lines(w_ptr, line_L, 0, L, g, BLOCK_C)
    inside_LC = (line_L < L)[:, None] & (column_C < g)[None, :]
    h_LC = tl.load(h_ptr + ((line_L % G) * g)[:, None] + column_C[None, :], mask=inside_LC, other=0.0)
    s_L = tl.load(scale_ptr + line_L, mask=line_L < L, other=1.0)
    best_L = _lost(w_LC, h_LC, s_L, power, LARGEST, LEAST, BASE, SQUARE)
    found_L = s_L
    if E4M3:
        code_L = tl.load(code_ptr + line_L, mask=line_L < L, other=1).to(tl.int32)
        global_scale = tl.load(global_ptr)
    for k in range(TRIES):
        if E4M3:
            moved_L = tl.minimum(tl.maximum(code_L + (FIRST + k), 1), LARGEST_CODE)
            exponent_L = tl.maximum(moved_L >> 3, 1)
            mantissa_L = tl.where(moved_L < 8, moved_L, 8 + (moved_L & 7)).to(tl.float32)
            n_L = mantissa_L * ((exponent_L + 117) << 23).to(tl.float32, bitcast=True)
            n_L = tl.where(k == -FIRST, s_L, tl.div_rn(n_L, tl.zeros(n_L.shape, tl.float32) + global_scale))
        else:
            n_L = s_L * tl.where(k == 0, 1.0, tl.where(k == 1, 2.0, 0.5))
            least = tl.full([], 5.877471754111438e-39, tl.float32)  # a plain subnormal is float64 to Triton 3.6
            n_L = tl.minimum(tl.maximum(n_L, least), 1.7014118346046923e38)
        e_L = _lost(w_LC, h_LC, n_L, power, LARGEST, LEAST, BASE, SQUARE)
        found_L, best_L = tl.where(e_L < best_L, n_L, found_L), tl.minimum(e_L, best_L)
    tl.store(out_ptr + line_L, found_L, mask=line_L < L)


@triton.jit
def _lost(
    w_LC, h_LC, s_L, power, LARGEST: tl.constexpr, LEAST: tl.constexpr, BASE: tl.constexpr, SQUARE: tl.constexpr
):  # fmt: skip
    """sum_j h_j |w_j - s Q(w_j / s)|^p of each line."""
    s_LC = tl.broadcast_to(s_L[:, None], w_LC.shape)
    v_LC = clamp(tl.div_rn(w_LC, s_LC), -LARGEST, LARGEST)
    step_LC = (v_LC.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^e
    base_LC = tl.maximum(step_LC, LEAST) * BASE
    e_LC = ((v_LC + base_LC) - base_LC) * s_LC - w_LC
    if SQUARE:
        lost_LC = h_LC * (e_LC * e_LC)
    else:  # log2 of 0 is -inf, whose power is 0
        lost_LC = h_LC * tl.exp2(power * tl.log2(tl.abs(e_LC)))
    return tl.sum(lost_LC, 1)
