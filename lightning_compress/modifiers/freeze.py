"""Freeze: some parameters do not train inside a window.

Their gradients are dropped before each step, and an optimizer skips parameters without a gradient: momentum and weight
decay do not move them, and their optimizer state does not change. ``requires_grad`` does not change, so that DDP's
buckets and the graph stay the same. Learning rates are left to Lightning's schedulers.
"""

from typing import Any, ClassVar

from pydantic import PrivateAttr
from torch import nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.matching import Names, listed, select

__all__ = ["FreezeModifier"]


class FreezeModifier(Modifier):
    """Keep parameters constant from ``start`` to ``end``, then let them train again.

    Args:
        targets: Modules (classes, names, ``re:`` patterns) whose parameters, also inside submodules, freeze.
        ignore: Submodules that keep training.
        start: When they freeze; the default is the first batch.
    """

    needs: ClassVar[Needs] = Needs(sharded=True)

    targets: Names = []
    ignore: Names = []
    start: float | None = 0.0

    _places: list[tuple[nn.Module, str]] = PrivateAttr(default_factory=list)  # of parameters, in their modules

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if not self.targets:
            raise ValueError("FreezeModifier: targets is empty; name the modules to freeze, such as ['re:.*embed']")
        modules = select(state.model, self.targets, self.ignore)
        ignored = select(state.model, self.ignore, field="ignore") if self.ignore else {}
        spared = {id(p) for module in ignored.values() for p in module.parameters()}
        self._places = [
            (owner, local)
            for module in modules.values()
            for owner in module.modules()
            for local, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in spared
        ]
        if not self._places:
            targets = listed(self.targets)
            raise ValueError(f"FreezeModifier: targets={targets} hold no parameter that trains; check the names")
        return True

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.OPTIM_PRE_STEP:
            for owner, local in self._places:
                if (parameter := _parameter(owner, local)) is not None:
                    parameter.grad = None


def _parameter(owner: nn.Module, local: str) -> nn.Parameter | None:
    """The parameter as it is now: sharding replaces it, a parametrization holds it, folding of BatchNorm removes it."""
    lists = getattr(owner, "parametrizations", None)
    if isinstance(lists, nn.ModuleDict) and local in lists:
        return lists.get_parameter(f"{local}.original")
    return owner._parameters.get(local)
