"""Which tensors of a model hold NaN or Inf: such a model is neither calibrated, nor exported, nor loaded.

The tensors are those of a state dict: parameters and persistent buffers. In a buffer -Inf alone is right, as attention
masks hold it, unless a normalization layer keeps its running statistics there.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.matrix import weight_of
from lightning_compress.layers.sharded import full

__all__ = ["check_finite", "is_finite", "nonfinite"]


def nonfinite(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> list[str]:
    """Names of the parameters and persistent buffers that hold NaN or Inf; those on meta are skipped.

    ``values``, by name, are checked in place of those of the model.
    """
    return [name for name, tensor, masks in _stored(model, values or {}) if not _is_sound(tensor, masks)]


def check_finite(modules: Mapping[str, nn.Module]) -> None:
    """ValueError names the modules whose weight holds NaN or Inf."""
    weights = {name: weight_of(module) for name, module in modules.items()}
    if broken := [repr(name) for name, weight in weights.items() if not (weight.is_meta or is_finite(weight))]:
        raise ValueError(f"the weight of {shortlist(broken)} holds NaN or Inf; did training diverge?")


def is_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or Inf. One reduction; elements are checked only when their sum is not finite."""
    tensor = full(tensor)  # of shards every rank must find the same
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # torch reduces no float8
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _stored(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    """Each tensor of the state dict: its name, its values, and whether it may be a mask."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{local}", values.get(f"{prefix}{local}", parameter), False
        for local, buffer in module._buffers.items():
            if buffer is not None and local not in module._non_persistent_buffers_set:
                yield f"{prefix}{local}", values.get(f"{prefix}{local}", buffer), not isinstance(module, _NormBase)


def _is_sound(tensor: Tensor, may_be_a_mask: bool) -> bool:
    if tensor.is_meta or is_finite(tensor):
        return True
    return may_be_a_mask and bool((tensor.float() < torch.inf).all())
