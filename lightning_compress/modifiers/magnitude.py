r"""Magnitude pruning: the smallest weights go, all at once or gradually while the model trains.

    score_rc = |W_rc|
    s_t = s_i + (s_f - s_i) c(p)           p: progress through the window; cubic: c = 1 - (1 - p)^3

Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878 (the schedule). Masks only grow; they are applied to
the weights after every optimizer step and to the gradients before it, so momentum and weight decay cannot bring a
weight back. What was pruned is zero in the model itself: the checkpoint keeps its dense keys.
"""

from typing import Any

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.matching import match_rank, select
from lightning_compress.maths.masked import MaskedWeights
from lightning_compress.maths.masks import check_structure, global_masks, keep_mask, n_of_m
from lightning_compress.maths.schedules import Schedule, progress, value_at

__all__ = ["MagnitudePruningModifier"]


class MagnitudePruningModifier(Modifier):
    """Prune by magnitude: with a window (``start``, ``end``) while training, without one after it.

    Args:
        targets: Modules whose weights are pruned: classes, names, ``re:`` patterns.
        ignore: What to leave out of ``targets``.
        init_sparsity: Share of zeros when the window opens, in [0, 1).
        final_sparsity: Share of zeros when it closes (with ``scope="global"`` over all targets together).
        layer_sparsity: Other final sparsities for some targets: ``{"re:.*down_proj": 0.8}``; not with a global scope.
        schedule: How sparsity goes from the first to the last: ``constant``, ``linear``, ``cosine``, ``cubic``,
            ``polynomial``.
        power: Exponent of ``polynomial``.
        mask_structure: ``unstructured``, ``N:M``, ``block RxC`` or ``channel`` (rows). N:M has no schedule: its mask is
            chosen when the window opens.
        scope: ``layer``: each target loses the same share; ``global``: one ranking over all (``unstructured`` only).

    Raises:
        ValueError: A sparsity outside of [0, 1), ``final < init``, a pattern whose sparsity is another, a width that it
            does not divide (the modules are named), an ``update`` larger than the window.
    """

    needs_calibration = True

    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    init_sparsity: float = 0.0
    final_sparsity: float = 0.5
    layer_sparsity: dict[str, float] = Field(default_factory=dict)
    schedule: Schedule = "cubic"
    power: float = 3.0
    mask_structure: str = "unstructured"
    scope: str = "layer"

    _weights: MaskedWeights = PrivateAttr(default_factory=lambda: MaskedWeights({}))

    @model_validator(mode="after")
    def _arguments_fit(self) -> "MagnitudePruningModifier":
        for name, value in [
            ("init_sparsity", self.init_sparsity),
            ("final_sparsity", self.final_sparsity),
            *((f"layer_sparsity[{target!r}]", value) for target, value in self.layer_sparsity.items()),
        ]:
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1)")
        if self.final_sparsity < self.init_sparsity:
            raise ValueError(
                f"final_sparsity={self.final_sparsity} is less than init_sparsity={self.init_sparsity}; masks only grow"
            )
        check_structure(self.mask_structure, self.final_sparsity)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope={self.scope!r} is unknown; expected 'layer' or 'global'")
        if self.scope == "global" and (self.mask_structure != "unstructured" or self.layer_sparsity):
            raise ValueError("scope='global' ranks single weights over all targets: unstructured, no layer_sparsity")
        if self.update and self.start is not None and self.end is not None and self.update > self.end - self.start:
            raise ValueError(
                f"update={self.update} is larger than the window from {self.start} to {self.end} ({self.unit}): "
                f"sparsity would jump to its end; give at most {self.end - self.start:g}"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the targets, and try the structure on each before any training."""
        assert state.model is not None
        self._weights = MaskedWeights(select(state.model, self.targets, self.ignore))
        unfit = []
        for name, W_RC in self._weights.matrices().items():
            try:
                keep_mask(W_RC.abs(), 0.5, self.mask_structure)
            except ValueError as error:
                unfit.append(f"{name} ({error})")
        if unfit:
            raise ValueError(f"mask_structure={self.mask_structure!r} does not fit: {'; '.join(unfit[:5])}")
        return True

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
        if event.type_ == EventType.OPTIM_PRE_STEP:
            self._weights.apply_to_gradients()
        elif event.type_ == EventType.OPTIM_POST_STEP:
            self._weights.apply_to_weights()

    def sparsity_at(self, index: float) -> float:
        """Progress curve at a point in time, in [0, 1]: 0 is ``init_sparsity``, 1 is ``final_sparsity``."""
        assert self.start is not None
        end = self.start if self.end is None else self.end
        return value_at(self.schedule, progress(index, self.start, end), 0.0, 1.0, self.power)

    # -- after training ------------------------------------------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.start is None:
            self._prune(1.0)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        for name, zeros in self._weights.sparsity().items():
            state.ledger.add(name, "magnitude", sparsity=zeros, params=self._weights.masks[name].numel())

    # -- masks ---------------------------------------------------------------------------------------------------------

    def _prune(self, curve: float) -> None:
        """Choose masks for this point of the curve (0: initial, 1: final sparsity) and apply them."""
        scores = {name: self._score(name, W_RC) for name, W_RC in self._weights.matrices().items()}
        if self.scope == "global":
            self._weights.set(global_masks(scores, self._sparsity(self.final_sparsity, curve)))
            return
        self._weights.set({
            name: keep_mask(score_RC, self._sparsity(self._final(name), curve), self.mask_structure)
            for name, score_RC in scores.items()
        })

    def _score(self, name: str, W_RC: Tensor) -> Tensor:
        """|W|, with what was pruned before below everything: masks only grow."""
        mask = self._weights.masks.get(name)
        return W_RC.abs() if mask is None else W_RC.abs().masked_fill(~mask, -1.0)

    def _final(self, name: str) -> float:
        """The final sparsity of one target: that of the ``layer_sparsity`` entry which fits it best."""
        module = self._weights.modules[name]
        ranked = [(match_rank(name, module, target), final) for target, final in self.layer_sparsity.items()]
        rank, final = max(ranked, key=lambda pair: pair[0], default=(0, 0.0))
        return final if rank else self.final_sparsity

    def _sparsity(self, final: float, curve: float) -> float:
        return self.init_sparsity + (final - self.init_sparsity) * curve

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": dict(self._weights.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights.masks = dict(state["masks"])
