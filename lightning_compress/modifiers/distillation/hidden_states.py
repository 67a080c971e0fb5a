"""Hidden states of student and teacher, in pairs: watched while the two run, brought to one width, handed out once."""

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
        feature_dim: See :func:`features_last`.
        projections: For pairs of different widths.
    """

    def __init__(self, names: Mapping[str, str], feature_dim: int | None, projections: Projections) -> None:
        self.names, self.feature_dim, self.projections = names, feature_dim, projections
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """ValueError when a name is none of a module, or the teacher has no modules."""
        if self.names and teacher is None:
            raise ValueError("hidden states need a teacher that is a module; a callable gives logits only")
        for ours, theirs in self.names.items():
            assert teacher is not None
            _submodule(student, ours, "hidden")
            _submodule(teacher, theirs, "hidden (teacher)")

    def watch(self, student: nn.Module, teacher: nn.Module | None, hook: Callable[..., Any]) -> None:
        """Keep outputs from now on; ``hook(module, function, kind)`` puts hooks on the student, we on the teacher."""
        for ours, theirs in self.names.items():
            assert teacher is not None
            hook(_submodule(student, ours, "hidden"), _keeper(self._ours, ours), "forward")
            inner = _submodule(teacher, theirs, "hidden (teacher)")
            self._hooks.append(inner.register_forward_hook(_keeper(self._theirs, ours, always=True)))

    def unwatch(self) -> None:
        """Take the hooks off the teacher."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._ours, self._theirs = [], {}, {}

    def take(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ours in the teacher's width, and the teacher's, [..., teacher's width] each, of the forward just made.

        Raises:
            ValueError: A module was not called, or the two differ in more than the width.
        """
        for name in self.names:
            if name not in self._ours or name not in self._theirs:
                raise ValueError(
                    f"hidden: {name!r} or its counterpart {self.names[name]!r} was not called in this forward; name "
                    f"modules that run in every batch"
                )
            ours = features_last(self._ours.pop(name), self.feature_dim)
            theirs = features_last(self._theirs.pop(name), self.feature_dim).to(ours.device)
            if ours.shape[:-1] != theirs.shape[:-1]:
                raise ValueError(
                    f"hidden {name!r}: student {tuple(ours.shape)}, teacher {tuple(theirs.shape)}, features last; "
                    f"expected equal shapes but for the features"
                )
            if ours.shape[-1] != theirs.shape[-1]:
                ours = self.projections.project(name, ours, theirs.shape[-1])
            yield ours, theirs


def _submodule(model: nn.Module, name: str, field: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        some = next((name for name, _ in model.named_modules() if name), "")
        raise ValueError(f"{field}: there is no module {name!r}; expected a dotted name such as {some!r}") from error


def _keeper(store: dict[str, Tensor], name: str, always: bool = False) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if always or torch.is_grad_enabled():  # a validation pass is not to be learned from
            store[name] = output[0] if isinstance(output, tuple) else output

    return keep
