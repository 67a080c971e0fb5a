r"""Magnitude pruning: the smallest weights are removed, at once or gradually while the model trains.

    score_rc = |W_rc|
    s_t = s_i + (s_f - s_i) c(p)           p: progress through the window; cubic: c = 1 - (1 - p)^3

Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878 (the schedule). Masks only grow; they are applied to
the weights after every optimizer step and to the gradients before it, so that momentum and weight decay cannot revive
a pruned weight. Pruned weights are zero in the model itself: the checkpoint has dense keys.
"""

import warnings
from typing import Any, ClassVar

from pydantic import PrivateAttr
from torch import Tensor

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.sharded import full
from lightning_compress.pruning.masked import OneByOne
from lightning_compress.pruning.masks import n_of_m
from lightning_compress.pruning.scheduled import ScheduledSparsity

__all__ = ["MagnitudePruningModifier"]


class MagnitudePruningModifier(ScheduledSparsity):
    """Prune by magnitude: with a window (``start``, ``end``) while training, without one after it.

    N:M has no schedule: its mask is chosen when the window opens. After the window the masks stay.

    Raises:
        ValueError: A sparsity outside of [0, 1) or other than that of the pattern, ``final < init``, a width that M
            does not divide (the message names the modules), an ``update`` larger than the window.
    """

    technique: ClassVar[str] = "magnitude"

    _curve: float | None = PrivateAttr(default=None)  # point of the schedule that the masks are for
    _reached: float | None = PrivateAttr(
        default=None
    )  # point that the run had reached before the best weights came back

    @property
    def needs(self) -> Needs:
        ranked = "scope='global' ranks all targets at once, and a rank holds shards of them; use scope='layer'"
        return Needs(fixed_shapes_from="start", sharded=self.scope == "layer" or ranked)

    # -- while training ------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.resumed:
            self._prune(self.sparsity_at(event.current_index))

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ in (EventType.BATCH_START, EventType.BATCH_END) and not n_of_m(self.mask_structure):
            self._prune(self.sparsity_at(event.current_index))

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._prune(1.0)

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            self._reached = None  # training goes on, after a test loop in between
        elif event.type_ == EventType.OPTIM_PRE_STEP:
            self._weights.apply_to_gradients()
        elif event.type_ == EventType.OPTIM_POST_STEP:
            self._weights.apply_to_weights()

    # -- after training ------------------------------------------------------------------------------------------------

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back; restore the masks that they were saved with."""
        reached = self._reached if self._reached is not None else self._curve
        self._restore(state)
        self._reached = reached

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.start is None:
            self._prune(1.0)
        elif self._reached is not None and (self._curve is None or self._curve < self._reached):
            before = self._weights.mean_sparsity()
            self._prune(self._reached)
            warnings.warn(
                f"{self.name}: the best checkpoint was saved at a sparsity of {before:.3f}, before the schedule had "
                f"reached {self._weights.mean_sparsity():.3f}: its smallest weights are pruned now, without training "
                f"after it; set load_best=False, or let the window end earlier",
                stacklevel=2,
            )
        else:
            self._weights.apply_to_weights()  # weights may have been loaded since the last step
        if self.start is not None and self._curve is not None and self._curve < 1.0:
            self.warn_of_an_early_end()
        self._reached = None

    # -- masks ---------------------------------------------------------------------------------------------------------

    def _prune(self, curve: float) -> None:
        """Choose masks for this point of the curve (0: initial, 1: final sparsity) and apply them."""
        if curve == self._curve:
            return  # the masks would be the same
        matrices = self._weights.matrices()
        scores = OneByOne(matrices, lambda name: self._score(name, matrices[name]))
        self._weights.set(self.masks_at(curve, scores))
        self._curve = curve

    def _score(self, name: str, W_RC: Tensor) -> Tensor:
        """|W|, and -1 where a weight is pruned already: masks only grow."""
        mask = self._weights.masks.get(name)
        return W_RC.abs() if mask is None else W_RC.abs().masked_fill(~full(mask).to(W_RC.device), -1.0)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "curve": self._curve}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._curve = state["curve"]
