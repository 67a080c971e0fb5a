"""A teacher that never trains: in eval mode, without gradients, on a device and in a dtype of choice."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modifiers.distillation.fingerprint import teacher_hash
from lightning_compress.modifiers.distillation.teacher_source import build_teacher

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """A teacher from :func:`build_teacher`.

    Args:
        source: Source of the teacher, see :func:`build_teacher`.
        student: The model, before any change.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None: unchanged.
        device: Device of the teacher; None: that of the inputs, so of the student.
    """

    def __init__(self, source: Any, student: nn.Module, dtype: str | None = None, device: str | None = None) -> None:
        self.call: Callable[..., Any] = build_teacher(source, student)
        self.follows = device is None
        if (module := self.module) is not None:
            module.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
        self.hash = teacher_hash(self.call)

    @property
    def module(self) -> nn.Module | None:
        """The teacher as a module; None for another callable."""
        return self.call if isinstance(self.call, nn.Module) else None

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load other weights of the same model.

        Raises:
            ValueError: The tensors have other names or shapes.
        """
        assert self.module is not None
        try:
            self.module.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"teacher='self': the model has changed its shape since set-up ({error}); distil from the start "
                f"(start=0), or give a checkpoint as the teacher"
            ) from error
        self.hash = teacher_hash(self.module)

    def ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The teacher's output for the student's inputs without labels.

        Raises:
            ValueError: The teacher does not take these inputs.
        """
        inputs = {key: value for key, value in kwargs.items() if key != "labels"}
        tensors = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor)]
        like = None if self.module is None else next(self.module.parameters(), None)
        if self.module is not None and like is not None and self.follows and tensors:
            if like.device != tensors[0].device:
                like = next(self.module.to(tensors[0].device).parameters())
        try:
            with torch.no_grad():
                return self.call(*_moved(args, like), **_moved(inputs, like))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError) as error:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(
                f"the teacher cannot be called with the model's inputs, of shapes {shapes}: {error}; expected a "
                f"teacher that takes what the model takes"
            ) from error


def _moved(value: Any, like: Tensor | None) -> Any:
    """Inputs on the device of a teacher's parameter, and floating-point ones in its dtype."""
    if like is None:
        return value
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _moved(v, like) for key, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(v, like) for v in value)
    return value
