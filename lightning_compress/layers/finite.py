"""Which tensors of a model hold NaN or Inf: such a model is neither calibrated, nor exported, nor loaded.

The tensors are those of a state dict: parameters and persistent buffers. In a buffer -Inf alone is right, as attention
masks hold it, unless a normalization layer keeps its running statistics there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

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
    stored = [(name, tensor, masks) for name, tensor, masks in _stored(model, values or {}) if not tensor.is_meta]
    finite = _are_finite([tensor for _, tensor, _ in stored])
    return [n for (n, t, masks), sound in zip(stored, finite, strict=True) if not (sound or (masks and _is_mask(t)))]


def check_finite(modules: Mapping[str, nn.Module]) -> None:
    """ValueError names the modules whose weight holds NaN or Inf."""
    weights = {name: weight for name, module in modules.items() if not (weight := weight_of(module)).is_meta}
    finite = _are_finite(list(weights.values()))
    if broken := [repr(name) for name, sound in zip(weights, finite, strict=True) if not sound]:
        raise ValueError(f"the weight of {shortlist(broken)} holds NaN or Inf; did training diverge?")


def is_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or Inf. One reduction; elements are checked only when their sum is not finite."""
    return _are_finite([tensor])[0]


def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """:func:`is_finite` of each; a GPU computes the sums of all before the host waits for them."""
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        tensor = full(tensor)  # of shards every rank must find the same
        if tensor.is_floating_point() and tensor.numel():
            tensor = _wide(tensor.detach())
            total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
            sums.setdefault(total.device, []).append((i, total))
    finite = [True] * len(tensors)
    for totals in sums.values():
        for (i, _), total in zip(totals, torch.stack([total for _, total in totals]).tolist(), strict=True):
            finite[i] = math.isfinite(total) or bool(torch.isfinite(_wide(full(tensors[i]))).all())
    return finite


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize == 1 else tensor  # torch reduces no float8


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


def _is_mask(tensor: Tensor) -> bool:
    return bool((tensor.float() < torch.inf).all())
