"""Freeze: some parameters do not train inside a window.

Their gradients are dropped before each step, and an optimizer passes over what has no gradient: momentum and weight
decay do not move it either, and its state is as it was when the window closes. ``requires_grad`` is left alone, so
DDP's buckets and the graph stay as they are. Learning rates stay with Lightning's schedulers.
"""

from typing import Any

from pydantic import PrivateAttr
from torch import nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.layers.matching import Names, listed, select

__all__ = ["FreezeModifier"]


class FreezeModifier(Modifier):
    """Hold parameters still from ``start`` to ``end``, then let them train as before.

    Args:
        targets: Modules (classes, names, ``re:`` patterns) whose own and inner parameters freeze.
        ignore: Modules inside them that go on training.
        start: When they freeze; the default is the first batch.
    """

    targets: Names = []
    ignore: Names = []
    start: float | None = 0.0

    _parameters: dict[str, nn.Parameter] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if not self.targets:
            raise ValueError("FreezeModifier: targets is empty; name the modules to freeze, such as ['re:.*embed']")
        found = select(state.model, self.targets, self.ignore)
        kept = select(state.model, self.ignore, field="ignore") if self.ignore else {}
        spared = {id(p) for module in kept.values() for p in module.parameters()}
        self._parameters = {
            f"{name}.{inner}": parameter
            for name, module in found.items()
            for inner, parameter in module.named_parameters()
            if parameter.requires_grad and id(parameter) not in spared
        }
        if not self._parameters:
            targets = listed(self.targets)
            raise ValueError(f"FreezeModifier: targets={targets} hold no parameter that trains; check the names")
        return True

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.OPTIM_PRE_STEP:
            for parameter in self._parameters.values():
                parameter.grad = None
