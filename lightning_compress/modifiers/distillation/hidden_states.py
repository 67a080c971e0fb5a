"""Pairs of hidden states of student and teacher: recorded by hooks, projected to one width."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.modifiers.distillation.model_outputs import features_last
from lightning_compress.modifiers.distillation.projections import Projections

__all__ = ["HiddenPairs"]


class HiddenPairs:
    """Outputs of modules of the student, each with one of the teacher.

    Args:
        names: Module names, student's to teacher's.
        feature_dim: Dimension of the features, see :func:`features_last`.
        projections: Projections for pairs of different widths.
    """

    def __init__(self, names: Mapping[str, str], feature_dim: int | None, projections: Projections) -> None:
        self.names, self.feature_dim, self.projections = names, feature_dim, projections
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """ValueError when a name is not that of a module, or the teacher has no modules."""
        if self.names and teacher is None:
            raise ValueError("hidden states need a teacher that is a module; a callable gives logits only")
        for name, teacher_name in self.names.items():
            assert teacher is not None
            _submodule(student, name, "hidden")
            _submodule(teacher, teacher_name, "hidden (teacher)")

    def watch(self, student: nn.Module, teacher: nn.Module | None, hook: Callable[..., Any]) -> None:
        """Record outputs from now on; ``hook(module, function, kind)`` hooks the student."""
        for name, teacher_name in self.names.items():
            assert teacher is not None
            hook(_submodule(student, name, "hidden"), _recorder(self._student, name), "forward")
            inner = _submodule(teacher, teacher_name, "hidden (teacher)")
            self._hooks.append(inner.register_forward_hook(_recorder(self._teacher, name, always=True)))

    def unwatch(self) -> None:
        """Remove the hooks from the teacher."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._student, self._teacher = [], {}, {}

    def take(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of the last forward, student's and teacher's, [..., teacher's width] each.

        Raises:
            ValueError: A module was not called, or the two differ in more than the width.
        """
        for name in self.names:
            if name not in self._student or name not in self._teacher:
                raise ValueError(
                    f"hidden: {name!r} or its counterpart {self.names[name]!r} was not called in this forward; name "
                    f"modules that run in every batch"
                )
            s = features_last(self._student.pop(name), self.feature_dim)
            t = features_last(self._teacher.pop(name), self.feature_dim).to(s.device)
            if s.shape[:-1] != t.shape[:-1]:
                raise ValueError(
                    f"hidden {name!r}: student {tuple(s.shape)}, teacher {tuple(t.shape)}, features last; expected "
                    f"equal shapes but for the features"
                )
            yield s if s.shape[-1] == t.shape[-1] else self.projections.project(name, s, t.shape[-1]), t


def _submodule(model: nn.Module, name: str, field: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        some = next((name for name, _ in model.named_modules() if name), "")
        raise ValueError(
            f"{field}: the model has no module {name!r}; expected a dotted name such as {some!r}"
        ) from error


def _recorder(store: dict[str, Tensor], name: str, always: bool = False) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        if always or torch.is_grad_enabled():  # without gradients: a validation pass
            store[name] = output[0] if isinstance(output, tuple) else output

    return record
