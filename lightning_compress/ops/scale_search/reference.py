"""Reference of the op, slow and obvious: every factor for every row.

    s, z = extremes of the group, as in ops/group_quant          t = W / s, in the dtype of W
    error(f, d) = sum_j h_j |t_j - f (clamp(round(t_j / f + z + d), low, high) - z - d)|^p
    f, d: 1, then from above 1 down by a ratio to the lowest; on, where errors still fall; between the factors;
          the zero point one lower or higher; with p = 2 the f that is best for the codes
    scale f s, zero point z + d

Each step replaces f and d where the error falls. Of scales with a format of their own those near s are tried instead:
6 codes of E4M3 up and down (NVFP4), or twice and half of it (MX formats).

Shapes: N rows, K columns, G groups of g = K / G columns in a row.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block.grid import round_float_
from lightning_compress.ops.group_quant.reference import limits, qparams

__all__ = [
    "CODES",
    "LARGEST_CODE",
    "LOWEST",
    "PATIENCE",
    "RATIO",
    "descend",
    "first_factor",
    "nearby_scales",
    "roots",
    "scale_codes",
    "scale_search",
    "scale_sweep",
    "sweep",
]

# Factors that are tried, by bits: from the highest down to the lowest, each so many times the one before. Measured on
# SmolLM2's weights (groups of 64) with their H: with the steps after it 27, 18 and 15 evaluations at 2, 3 and 4 bits,
# whose error is 1.001, 1.004 and 1.010 of that of 300 factors.
RATIO = {bits: 1 - 0.12 * 0.7 ** max(0, bits - 4) for bits in range(2, 9)}
LOWEST = {bits: 0.3 / 1.5 ** (4 - bits) if bits < 4 else 0.3 ** (0.5 ** (bits - 4)) for bits in range(2, 9)}
EXPONENTS = (1, -1)  # of a power of two, beside the one from the extremes
CODES = range(-6, 7)  # of E4M3, beside the one from the extremes: factors of about 0.57 to 1.75
LARGEST_CODE = 126  # codes 1 ... 126 are the positive finite numbers, in order; 127 is NaN
PATIENCE = 3  # factors below the lowest that a row may try without a gain


def first_factor(low: float, high: float) -> float:
    """The highest factor: above 1, since the largest weight may be positive."""
    return (high - low) / 2 / high


def roots(power: float) -> tuple[int, ...]:
    """After the walk the factors ratio^(1 / root) above and below the best are tried."""
    return (2,) if power == 2 else (2, 4)


def scale_search(
    W_NK: Tensor, h_K: Tensor, group: int, bits: int, symmetric: bool, float8: bool, power: float
) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] in the dtype of W, and zero point int8 [N, G], or None (symmetric)."""
    low, high = limits(bits, float8)
    scale_NG, zero_NG = qparams(W_NK, group, bits, symmetric, float8)
    t_GNg = (W_NK.unflatten(1, (-1, group)) / scale_NG[:, :, None]).float().transpose(0, 1).contiguous()
    z_GN1 = None if zero_NG is None else zero_NG.t().float()[:, :, None]
    h_Gg = h_K.view(-1, group)

    def weighted(e_GNg: Tensor) -> Tensor:
        return torch.stack([e_Ng @ h_g for e_Ng, h_g in zip(e_GNg, h_Gg, strict=True)])

    def codes(f: Tensor | float, d: Tensor | float) -> Tensor:
        v = t_GNg * (1 / f)
        if z_GN1 is None:
            return round_float_(v, 8) if float8 else v.round().clamp(low, high)
        return (v + (z_GN1 + d)).round().clamp(low, high) - (z_GN1 + d)

    def error(f: Tensor | float, d: Tensor | float) -> Tensor:
        f, d = (v[:, :, None] if isinstance(v, Tensor) else v for v in (f, d))
        q = codes(f, d)
        e = q * f - t_GNg if isinstance(f, Tensor) else torch.sub(t_GNg, q, alpha=f)
        sums = weighted(e * e if power == 2 else e.abs().pow(power))
        if z_GN1 is None:
            return sums
        z = (z_GN1 + d)[:, :, 0]
        return sums.masked_fill((z < low) | (z > high), math.inf)

    def fit(f: Tensor, d: Tensor) -> Tensor:
        q = codes(f[:, :, None], d[:, :, None])
        above, below = weighted(t_GNg * q), weighted(q * q)
        return (above / below).where((above > 0) & (below > 0), f)

    f_GN, d_GN = descend(error, fit, bits, first_factor(low, high), power, not symmetric)
    best = (scale_NG.float() * f_GN.t()).to(scale_NG.dtype).contiguous()
    best = best.where((best > 0) & best.isfinite(), scale_NG)
    return best, None if zero_NG is None else zero_NG + d_GN.t().to(torch.int8)


def descend(
    error: Callable[[Tensor | float, Tensor | float], Tensor],
    fit: Callable[[Tensor, Tensor], Tensor],
    bits: int,
    first: float,
    power: float,
    shifts: bool,
) -> tuple[Tensor, Tensor]:
    """The factor and the shift of the zero point with the least error, in the shape of an error.

    Args:
        error: Errors for a factor and a shift, of all lines or of each.
        fit: The best factors for the codes of factors and shifts.
        bits: Bits of a code.
        first: The highest factor.
        power: p; for 2 ``fit`` is the last step.
        shifts: Whether there is a zero point.
    """
    best = error(1.0, 0.0)
    best_f, best_d = torch.ones_like(best), torch.zeros_like(best)

    def improve(f: Tensor | float, d: Tensor | float, among: Tensor | bool = True) -> Tensor:
        nonlocal best, best_f, best_d
        new = error(f, d)
        better = (new < best) & among
        best, best_f, best_d = torch.where(better, new, best), torch.where(better, f, best_f), best_d.where(~better, d)
        return better

    f, fell = first, torch.zeros_like(best, dtype=torch.bool)
    while f > LOWEST[bits]:
        fell, f = improve(f, 0.0), f * RATIO[bits]
    patience = PATIENCE * fell
    while (patience > 0).any() and f > torch.finfo(torch.float32).eps:
        patience, f = (patience - 1).masked_fill(improve(f, 0.0, patience > 0), PATIENCE), f * RATIO[bits]
    for root in roots(power):
        middle, step = best_f, RATIO[bits] ** (1 / root)
        improve(middle * step, 0.0)
        improve(middle / step, 0.0)
    if shifts:
        improve(best_f, -1.0)
        improve(best_f, 1.0)
    if power == 2:
        improve(fit(best_f, best_d), best_d)
    return best_f, best_d


def scale_sweep(
    W_NK: Tensor, scale_NG: Tensor, h_K: Tensor, bits: int, global_scale: Tensor | None, power: float
) -> Tensor:
    """The scale with the least sum_j h_j |w_j - Q(w_j)|^p near each, [N, G], float32.

    Args:
        W_NK: The weight.
        scale_NG: Scales of the extremes, float32.
        h_K: h.
        bits: The format of the codes, 4 (E2M1), 6 (E2M3) or 8 (E4M3).
        global_scale: Scales are E4M3 numbers over this one, float32 [1]; None: powers of two.
        power: p.
    """
    h_Gg = h_K.view(scale_NG.shape[1], -1).float()

    def lost(e_NGg: Tensor) -> Tensor:
        return torch.einsum("rgk,gk->rg", e_NGg.mul_(e_NGg) if power == 2 else e_NGg.abs_().pow_(power), h_Gg)

    return sweep(W_NK, scale_NG, bits, global_scale, lost)


def sweep(
    W_NK: Tensor, scale_NG: Tensor, bits: int, global_scale: Tensor | None, lost: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same for any loss [N, G] of the errors [N, G, g], which it may overwrite."""
    w_NGg = W_NK.float().unflatten(1, (scale_NG.shape[1], -1))
    e_NGg, best_NG, least_NG = torch.empty_like(w_NGg), scale_NG, torch.full_like(scale_NG, math.inf)
    for candidate_NG in (scale_NG, *nearby_scales(scale_NG, global_scale)):
        s = candidate_NG[:, :, None]
        round_float_(torch.div(w_NGg, s, out=e_NGg), bits).mul_(s).sub_(w_NGg)
        loss_NG = lost(e_NGg)
        better = loss_NG < least_NG
        best_NG, least_NG = torch.where(better, candidate_NG, best_NG), torch.where(better, loss_NG, least_NG)
    return best_NG.contiguous()


def nearby_scales(scale_NG: Tensor, global_scale: Tensor | None) -> Iterator[Tensor]:
    """Scales that the format can store around these, [N, G] each."""
    if global_scale is None:
        for shift in EXPONENTS:
            yield (scale_NG * 2.0**shift).clamp(2.0**-127, 2.0**127)
        return
    codes = scale_codes(scale_NG, global_scale).to(torch.int16)
    for shift in CODES:
        if shift:
            moved = (codes + shift).clamp_(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn)
            yield moved.float() / global_scale


def scale_codes(scale_NG: Tensor, global_scale: Tensor) -> Tensor:
    """The codes of scales in E4M3, uint8."""
    return (scale_NG * global_scale).to(torch.float8_e4m3fn).view(torch.uint8)
