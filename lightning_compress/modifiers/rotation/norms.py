"""Recognize a normalization by what it computes, whatever its class is called.

    RMSNorm     y = x / sqrt(mean x^2 + eps) * g              Zhang and Sennrich 2019, arXiv:1910.07467
    LayerNorm   y = (x - mean x) / sqrt(var x + eps) * g + b  Ba et al. 2016, arXiv:1607.06450

g is a parameter, or 1 + a parameter (Gemma), or missing.
"""

import torch
from torch import Tensor, nn

from lightning_compress.modifiers.rotation.spaces import Norm, Slot

__all__ = ["normalized", "recognize"]


@torch.no_grad()
def recognize(name: str, module: nn.Module, width: int, device: torch.device) -> Norm | None:
    """The normalization over ``width`` features that a module computes; None where it is not one.

    Args:
        name: Dotted name of the module.
        module: A module without children.
        width: Size of the last dimension.
        device: Device that the module runs on.
    """
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if any(p.shape != (width,) for p in parameters.values()) or len(parameters) > 2:
        return None
    if not parameters and "norm" not in type(module).__name__.lower():
        return None
    if len(parameters) == 2 and "bias" not in parameters:
        return None
    bias = parameters.pop("bias", None)
    gain_name, gain = next(iter(parameters.items()), ("", None))
    dtype = next((p.dtype for p in (gain, bias) if p is not None), torch.get_default_dtype())
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 4, width, generator=generator, dtype=torch.float32, device="cpu") + 1).to(device, dtype)
    try:
        y = module(x)
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for centered in (False, True):
        for offset in (0, 1) if gain is not None else (0,):
            if _close(y, _norm(x, centered, gain, offset, bias)):
                slots = (Slot(name, n) if p is not None else None for n, p in ((gain_name, gain), ("bias", bias)))
                return Norm(name, centered, next(slots), offset, next(slots))
    return None


def normalized(x: Tensor, centered: bool) -> Tensor:
    """x without its mean where ``centered``, over the root of its mean square; zeros stay zeros."""
    x = x - x.mean(-1, keepdim=True) if centered else x
    return x * x.square().mean(-1, keepdim=True).clamp_min(1e-20).rsqrt()


def _norm(x: Tensor, centered: bool, gain: Tensor | None, offset: int, bias: Tensor | None) -> Tensor:
    y = normalized(x.double(), centered)
    y = y if gain is None else y * (gain.double() + offset)
    return y if bias is None else y + bias.double()


def _close(y: Tensor, expected: Tensor) -> bool:
    """Equal up to eps and the rounding of the dtype."""
    tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((y.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-6))
