"""Constant pruning: the zeros that are there stay, while training goes on.

For a model that was pruned before (by magnitude, SparseGPT, Wanda, or loaded sparse) and is now fine-tuned, distilled,
or trained through fake-quantization. The mask is read off the weights when the window opens: True where W != 0.
"""

from typing import Any

from pydantic import Field, PrivateAttr

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.matching import select
from lightning_compress.maths.masked import MaskedWeights

__all__ = ["ConstantPruningModifier"]


class ConstantPruningModifier(Modifier):
    """Hold the zeros of the targets from ``start`` on; when the window ends they are free again.

    Args:
        targets: Modules whose zeros are held: classes, names, ``re:`` patterns.
        ignore: What to leave out of ``targets``.
        start: When the mask is read; the default is the first batch.
    """

    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    start: float | None = 0.0

    _weights: MaskedWeights = PrivateAttr(default_factory=lambda: MaskedWeights({}))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self._weights = MaskedWeights(select(state.model, self.targets, self.ignore))
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.resumed:
            self._weights.set({name: W_RC != 0 for name, W_RC in self._weights.matrices().items()})

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.OPTIM_PRE_STEP:
            self._weights.apply_to_gradients()
        elif event.type_ == EventType.OPTIM_POST_STEP:
            self._weights.apply_to_weights()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._weights.set({})

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        for name, zeros in self._weights.sparsity().items():
            state.ledger.add(name, "constant pruning", sparsity=zeros)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": dict(self._weights.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights.masks = dict(state["masks"])
