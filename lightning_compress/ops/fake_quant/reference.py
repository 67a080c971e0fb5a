"""Reference of the op, slow and obvious: values, and the gradients that training uses.

    q   = clamp(round(W / s + z), low, high)        to integers, or to the values of E2M1, E2M3 or E4M3
    W^  = (q - z) s                                 of the formats that readers compute in bfloat16 rounded to that

Rounding has no useful derivative. Both gradients are those of a surrogate in which rounding is the identity
(straight-through) or adds a constant error r (LSQ: Esser et al. 2020, arXiv:1902.08153, eq. 3 and 5):

    straight through    dW^/dW = 1 where rounding lands on the grid, 0 where it is clamped
    LSQ                 dW^/dW = 1 where low < v < high, else 0;      v = W / s + z
                        dW^/ds = (q - z) - W / s inside, low - z below, high - z above;   times 1 / sqrt(N high)

Shapes: R rows, C columns, G groups of C / G columns; scale and zero point [1], [R, 1] or [R, G]; N weights per scale.
"""

import torch
from torch import Tensor

__all__ = ["fake_quantize", "learned_step_gradients", "straight_through_gradient"]

HALF_STEP = {0: 0.5, 4: 1.0, 6: 0.25, 8: 16.0}
"""Distance beyond the last value of the grid up to which numbers round to it, by the bits of floats; 0: integers."""


def fake_quantize(
    W_RC: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: float,
    high: float,
    float_bits: int = 0,
    through_bf16: bool = False,
) -> Tensor:
    """W^ [R, C], in the dtype of W."""
    s_RC, z_RC, v_RC = _on_grid(W_RC, scale, zero)
    Q_RC = (_nearest(v_RC.clamp(low, high), float_bits) - z_RC) * s_RC
    return (Q_RC.to(torch.bfloat16) if through_bf16 else Q_RC).to(W_RC.dtype)


def straight_through_gradient(
    gradient_RC: Tensor, W_RC: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, float_bits: int = 0
) -> Tensor:
    """The gradient of W [R, C], from the gradient of W^."""
    _, _, v_RC = _on_grid(W_RC, scale, zero)
    half = HALF_STEP[float_bits]
    return gradient_RC * ((v_RC >= low - half) & (v_RC <= high + half))


def learned_step_gradients(
    gradient_RC: Tensor, W_RC: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, float_bits: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradients of W [R, C] and of the scale (in its shape), from the gradient of W^."""
    s_RC, z_RC, v_RC = _on_grid(W_RC, scale, zero)
    q_RC = _nearest(v_RC.clamp(low, high), float_bits)
    slope_RC = (q_RC - z_RC) - W_RC / s_RC
    slope_RC = torch.where(v_RC <= low, low - z_RC, slope_RC)
    slope_RC = torch.where(v_RC >= high, high - z_RC, slope_RC)
    weights_per_scale = W_RC.numel() // scale.numel()
    summed = torch.zeros_like(scale, dtype=v_RC.dtype)
    R, C = W_RC.shape
    for r in range(R):
        for c in range(C):
            row, group = (0, 0) if scale.ndim == 1 else (r, c * scale.shape[1] // C)
            summed.view(-1, 1 if scale.ndim == 1 else scale.shape[1])[row, group] += gradient_RC[r, c] * slope_RC[r, c]
    inside_RC = (v_RC > low) & (v_RC < high)
    return gradient_RC * inside_RC, summed / (weights_per_scale * high) ** 0.5


def _nearest(v: Tensor, float_bits: int) -> Tensor:
    """The nearest integer, or number of the format, ties to even; v is inside of the grid."""
    if float_bits == 8:
        return v.to(torch.float8_e4m3fn).to(v.dtype)
    if not float_bits:
        return v.round()
    fraction = 2 ** {4: 1, 6: 3}[float_bits]  # E2M1, E2M3: numbers below 1 are as far apart as those above it
    pairs = [divmod(i, fraction) for i in range(4 * fraction)]
    numbers = [m / fraction if e == 0 else (1 + m / fraction) * 2 ** (e - 1) for e, m in pairs]
    table = torch.tensor(numbers, dtype=v.dtype, device=v.device)
    middle = (table[1:] + table[:-1]) / 2
    index = torch.bucketize(v.abs(), middle)  # the lower one of two that are equally near
    tie = v.abs() == middle[index.clamp(max=len(middle) - 1)]
    return table[index + (tie & (index % 2 == 1))].copysign(v)


def _on_grid(W_RC: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """s, z and v = W / s + z, each [R, C], in float32 or wider."""
    R, C = W_RC.shape
    wide = torch.promote_types(W_RC.dtype, torch.float32)
    s_RG, z_RG = (t.to(wide).expand(R, -1) for t in (scale, torch.zeros_like(scale) if zero is None else zero))
    s_RC, z_RC = (t_RG.repeat_interleave(C // t_RG.shape[1], 1) for t_RG in (s_RG, z_RG))
    return s_RC, z_RC, W_RC.to(wide) / s_RC + z_RC
