"""Constant pruning: weights that are zero stay zero while training goes on.

For a model that is pruned already (by magnitude, SparseGPT, Wanda, or loaded sparse) and is now fine-tuned, distilled,
or trained through fake-quantization. The mask is taken from the weights when the window opens: True where W != 0.
"""

import warnings
from typing import Any, ClassVar

from pydantic import PrivateAttr

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.matching import Names, select_weights
from lightning_compress.pruning.masked import MaskedWeights, OneByOne

__all__ = ["ConstantPruningModifier"]


class ConstantPruningModifier(Modifier):
    """Keep the zeros of the targets from ``start`` until the window ends.

    Args:
        targets: Modules whose zeros are kept: classes, names, ``re:`` patterns.
        ignore: Modules to leave out of ``targets``.
        start: When the mask is taken from the weights; the default is the first batch.
    """

    needs: ClassVar[Needs] = Needs(fixed_shapes_from="start", sharded=True)

    targets: Names = ["Linear"]
    ignore: Names = []
    start: float | None = 0.0

    _weights: MaskedWeights = PrivateAttr(default_factory=lambda: MaskedWeights({}))

    def touches(self, state: State) -> set[str]:
        return set(select_weights(state.model, self.targets, self.ignore))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._weights = MaskedWeights(select_weights(state.model, self.targets, self.ignore))
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.resumed:
            matrices = self._weights.matrices()
            self._weights.set(OneByOne(matrices, lambda name: matrices[name] != 0))

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.OPTIM_PRE_STEP:
            self._weights.apply_to_gradients()
        elif event.type_ == EventType.OPTIM_POST_STEP:
            self._weights.apply_to_weights()

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back; restore the mask that they were saved with, if there was one."""
        if state["masks"] or not self._weights.masks:
            self._weights.masks = dict(state["masks"])

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        before = self._weights.mean_sparsity()
        self._weights.apply_to_weights()
        if (after := self._weights.mean_sparsity()) > before:
            warnings.warn(
                f"{self.name}: the best weights, loaded after training, were saved before start={self.start} (unit: "
                f"{self.unit}), when {before:.3f} of the weights were zero: the mask of the run makes it {after:.3f} "
                f"now, without training after it; set load_best=False, or start earlier",
                stacklevel=2,
            )

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._weights.set({})

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        for name, zeros in self._weights.sparsity().items():
            state.ledger.add(name, "constant pruning", sparsity=zeros)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": self._weights.whole_masks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights.masks = dict(state["masks"])
