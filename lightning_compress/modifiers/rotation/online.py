r"""Rotations that run beside a Linear at every call, where nothing before or after it can take them in.

    M = diag(signs) H / sqrt(h), h neighbours at a time
    input     y = (x M) (W M)^T             R4 of QuaRot; V of QuIP#
    output    y = (x (M^T W)^T) M^T          U of QuIP#: the rows of the weight are turned, and the output turned back

What is here is the first half of each pair; the weights are turned by fuse.py. The record is a plain attribute
of the module, as in quant/record.py, so keys of ``state_dict`` stay as they are: a checkpoint alone does not hold it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.modifiers.rotation.hadamard import fast_hadamard_transform, hadamard

__all__ = ["Online", "attach_online", "detach_online", "online_from_json", "online_modules", "online_to_json"]

_ATTRIBUTE = "_lightning_compress_online"


@dataclass(frozen=True)
class Online:
    """One rotation beside a module.

    Args:
        side: Of its ``input`` or of its ``output``.
        signs: +-1 of the h features that are rotated among themselves; an order of a Hadamard matrix.
    """

    side: Literal["input", "output"]
    signs: tuple[int, ...]

    def matrix(self) -> Tensor:
        """M [h, h], float64."""
        signs_h = torch.tensor(self.signs, dtype=torch.float64)
        return signs_h[:, None] * hadamard(len(self.signs)) / math.sqrt(len(self.signs))

    def apply(self, x: Tensor, *, back: bool = False) -> Tensor:
        """x M, or with ``back`` x M^T, worked out in float32 (float64 of such), in the dtype of x."""
        h = len(self.signs)
        y = x.unflatten(-1, (-1, h)).to(torch.promote_types(x.dtype, torch.float32))
        signs_h = torch.tensor(self.signs, dtype=y.dtype, device=y.device)
        if back:
            y = fast_hadamard_transform(y, transpose=True) * signs_h
        else:
            y = fast_hadamard_transform(y * signs_h)
        return (y / math.sqrt(h)).flatten(-2).to(x.dtype)


def attach_online(module: nn.Module, online: Online) -> None:
    """Rotate the module's input, before any other hook sees it, or its output, from now on."""
    before = [other for other in _records(module) if other.side != online.side]
    if not any(other.side == online.side for other in _records(module)):
        if online.side == "input":
            module.register_forward_pre_hook(_rotate_input, prepend=True)
        else:
            module.register_forward_hook(_rotate_output, prepend=True)
    setattr(module, _ATTRIBUTE, (*before, online))


def detach_online(module: nn.Module) -> None:
    """Take the records and the hooks off."""
    if _records(module):
        delattr(module, _ATTRIBUTE)
        hooks: tuple[Any, ...] = (module._forward_pre_hooks, module._forward_hooks)
        for kind in hooks:  # by identity: a kept handle would not survive copy.deepcopy
            for key in [key for key, hook in kind.items() if hook in (_rotate_input, _rotate_output)]:
                del kind[key]


def online_modules(model: nn.Module) -> dict[str, tuple[Online, ...]]:
    """What runs beside modules, by their dotted name."""
    return {name: _records(module) for name, module in model.named_modules() if _records(module)}


def online_to_json(records: tuple[Online, ...]) -> list[dict[str, Any]]:
    """Numbers, strings and lists."""
    return [asdict(online) | {"signs": list(online.signs)} for online in records]


def online_from_json(data: list[dict[str, Any]]) -> tuple[Online, ...]:
    """The reverse of :func:`online_to_json`."""
    return tuple(Online(entry["side"], tuple(entry["signs"])) for entry in data)


def _records(module: nn.Module) -> tuple[Online, ...]:
    records: tuple[Online, ...] = getattr(module, _ATTRIBUTE, ())
    return records


def _rotate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    online = next(record for record in _records(module) if record.side == "input")
    return (online.apply(args[0]), *args[1:])


def _rotate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return next(record for record in _records(module) if record.side == "output").apply(output, back=True)
