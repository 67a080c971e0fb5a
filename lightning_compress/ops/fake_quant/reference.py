"""Reference of the op, slow and obvious: values, and the gradients that training uses.

    q   = clamp(round(W / s + z), low, high)        to integers, or to the values of FP8 (e4m3)
    W^  = (q - z) s

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

HALF_STEP = {False: 0.5, True: 16.0}
"""Distance beyond the last value of the grid up to which numbers round to it: integers; FP8, whose last step is 32."""


def fake_quantize(
    W_RC: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, float8: bool = False
) -> Tensor:
    """W^ [R, C], in the dtype of W."""
    s_RC, z_RC, v_RC = _on_grid(W_RC, scale, zero)
    q_RC = v_RC.clamp(low, high)
    q_RC = q_RC.to(torch.float8_e4m3fn).to(v_RC.dtype) if float8 else q_RC.round()
    return ((q_RC - z_RC) * s_RC).to(W_RC.dtype)


def straight_through_gradient(
    gradient_RC: Tensor, W_RC: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, float8: bool = False
) -> Tensor:
    """The gradient of W [R, C], from the gradient of W^."""
    _, _, v_RC = _on_grid(W_RC, scale, zero)
    half = HALF_STEP[float8]
    return gradient_RC * ((v_RC >= low - half) & (v_RC <= high + half))


def learned_step_gradients(
    gradient_RC: Tensor, W_RC: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, float8: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradients of W [R, C] and of the scale (in its shape), from the gradient of W^."""
    s_RC, z_RC, v_RC = _on_grid(W_RC, scale, zero)
    q_RC = v_RC.to(torch.float8_e4m3fn).to(v_RC.dtype) if float8 else v_RC.round()
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


def _on_grid(W_RC: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """s, z and v = W / s + z, each [R, C], in float32 or wider."""
    R, C = W_RC.shape
    wide = torch.promote_types(W_RC.dtype, torch.float32)
    s_RG, z_RG = (t.to(wide).expand(R, -1) for t in (scale, torch.zeros_like(scale) if zero is None else zero))
    s_RC, z_RC = (t_RG.repeat_interleave(C // t_RG.shape[1], 1) for t_RG in (s_RG, z_RG))
    return s_RC, z_RC, W_RC.to(wide) / s_RC + z_RC
