"""Reference of the ops, slow and obvious: scale and zero point from the extremes of a group, then the codes.

    a = min(W, 0)    b = max(W, 0)    of a group, so that 0 is always on the grid
    symmetric:  s = max(-a, b) / ((high - low) / 2)
    asymmetric: s = (b - a) / (high - low)      z = round(clamp(low - a / s, low, high)), ties to even
    q = round(clamp(W / s + z, low, high))      W^ = (q - z) s

Scales are computed in the dtype of W, each step rounded to it, as in compressed-tensors' calculate_qparams; codes are
computed in float32 from the stored scale. A scale of 0 becomes the epsilon of its dtype, and a group of zeros has the
zero point 0. FP8 (e4m3) rounds to its numbers in place of integers, with low and high -448 and 448.

Shapes: N rows, K columns, G groups of g = K / G columns in a row.
"""

import torch
from torch import Tensor

__all__ = ["codes", "limits", "qparams", "values"]


def limits(bits: int, float8: bool = False) -> tuple[float, float]:
    """Lowest and highest code."""
    return (-448.0, 448.0) if float8 else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def qparams(W_NK: Tensor, group: int, bits: int, symmetric: bool, float8: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] in the dtype of W, and zero point int8 [N, G], or None (symmetric)."""
    low, high = limits(bits, float8)
    W_NGg = W_NK.unflatten(1, (-1, group))
    a_NG, b_NG = W_NGg.amin(-1).clamp(max=0), W_NGg.amax(-1).clamp(min=0)
    eps = torch.finfo(W_NK.dtype).eps
    if symmetric:
        s_NG = torch.maximum(-a_NG, b_NG) / torch.tensor((high - low) / 2, dtype=W_NK.dtype, device=W_NK.device)
        return s_NG.masked_fill(s_NG == 0, eps), None
    s_NG = (b_NG - a_NG) / torch.tensor(high - low, dtype=W_NK.dtype, device=W_NK.device)
    z_NG = (low - a_NG / s_NG).clamp(low, high).round().masked_fill((a_NG == 0) & (b_NG == 0), 0).to(torch.int8)
    return s_NG.masked_fill(s_NG == 0, eps), z_NG


def codes(W_NK: Tensor, s_NG: Tensor, z_NG: Tensor | None, bits: int, float8: bool = False) -> Tensor:
    """q [N, K], float32."""
    low, high = limits(bits, float8)
    v_NGg = W_NK.float().unflatten(1, (s_NG.shape[1], -1)) / s_NG.float().unsqueeze(-1)
    v_NGg = (v_NGg if z_NG is None else v_NGg + z_NG.unsqueeze(-1)).clamp(low, high)
    return (v_NGg.to(torch.float8_e4m3fn).float() if float8 else v_NGg.round()).flatten(1)


def values(q_NK: Tensor, s_NG: Tensor, z_NG: Tensor | None) -> Tensor:
    """W^ [N, K] in the dtype of the scale."""
    q_NGg = q_NK.unflatten(1, (s_NG.shape[1], -1))
    q_NGg = q_NGg if z_NG is None else q_NGg - z_NG.unsqueeze(-1)
    return (q_NGg * s_NG.float().unsqueeze(-1)).flatten(1).to(s_NG.dtype)
