r"""Rotations that run beside a Linear at every call, where they cannot be fused into the weights around it.

    M = diag(signs) H / sqrt(h), h neighbours at a time
    input     y = (x M) (W M)^T             R4 of QuaRot; V of QuIP#
    output    y = (x (M^T W)^T) M^T          U of QuIP#: the rows of the weight are turned, and the output turned back

This file turns x and the output; fuse.py and block_hadamard.py turn the weights. A checkpoint alone does not hold the
record (layers/records.py). Modules that are called with one tensor (q, k, v; gate, up) turn it once: the result lives
as long as the tensor.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_compress.layers.records import Record
from lightning_compress.modifiers.rotation.hadamard import fast_hadamard_transform, hadamard

__all__ = ["OnlineRotation", "OnlineRotations"]

_TURNED = "_lightning_compress_turned"


@dataclass(frozen=True)
class OnlineRotation:
    """One rotation beside a module.

    Args:
        side: ``input`` or ``output`` of the module.
        signs: +-1 for each of h features that are rotated among themselves; h is the order of a Hadamard matrix.
    """

    side: Literal["input", "output"]
    signs: tuple[int, ...]

    def matrix(self) -> Tensor:
        """M [h, h], float64."""
        signs_h = torch.tensor(self.signs, dtype=torch.float64, device="cpu")
        return signs_h[:, None] * hadamard(len(self.signs)) / math.sqrt(len(self.signs))

    def apply(self, x: Tensor, *, back: bool = False) -> Tensor:
        """x M, or with ``back`` x M^T, computed in float32 (float64 for float64), in the dtype of x."""
        h = len(self.signs)
        y = x.unflatten(-1, (-1, h)).to(torch.promote_types(x.dtype, torch.float32))
        signs_h = torch.tensor(self.signs, dtype=y.dtype, device=y.device) if -1 in self.signs else None
        if signs_h is not None and not back:
            y = y * signs_h
        y = fast_hadamard_transform(y, transpose=back)
        if signs_h is not None and back:
            y = y * signs_h
        return (y / math.sqrt(h)).flatten(-2).to(x.dtype)

    def apply_once(self, x: Tensor) -> Tensor:
        """:meth:`apply`, or what it returned at the last call, where x is the tensor of that call and has not changed.

        Not where a change would go unseen (inference tensors have no version), nor for a leaf with a gradient, which
        its own result would keep alive.
        """
        if torch.compiler.is_compiling() or x.is_inference() or (x.requires_grad and x.is_leaf):
            return self.apply(x)
        key = (self.signs, x._version, torch.is_grad_enabled())
        last = getattr(x, _TURNED, None)
        if last is None or last[0] != key:
            last = (key, self.apply(x))
            setattr(x, _TURNED, last)
        y: Tensor = last[1]
        return y


def _rotate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    record = OnlineRotations.of(module)
    assert record is not None
    return (record.rotation("input").apply_once(args[0]), *args[1:])


def _rotate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    record = OnlineRotations.of(module)
    assert record is not None
    return record.rotation("output").apply(output, back=True)


@dataclass(frozen=True)
class OnlineRotations(Record):
    """Rotations of one module: of its input, before any other hook sees it, of its output, or both.

    Args:
        rotations: At most one for each side.
        in_config: An export states them in config.json, as ``transform_config``, in place of a file that only this
            package reads.
    """

    attribute = "_lightning_compress_online"
    hooks = (_rotate_input, _rotate_output)

    rotations: tuple[OnlineRotation, ...]
    in_config: bool = False

    def rotation(self, side: Literal["input", "output"]) -> OnlineRotation:
        """The rotation of one side, which must exist."""
        return next(rotation for rotation in self.rotations if rotation.side == side)

    def register(self, module: nn.Module) -> None:
        for rotation in self.rotations:
            if rotation.side == "input":
                module.register_forward_pre_hook(_rotate_input, prepend=True)
            else:
                module.register_forward_hook(_rotate_output, prepend=True)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(rotation) | {"signs": list(rotation.signs)} for rotation in self.rotations]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return cls(tuple(OnlineRotation(entry["side"], tuple(entry["signs"])) for entry in data))
