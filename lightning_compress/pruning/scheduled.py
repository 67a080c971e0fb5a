"""What modifiers share that prune on a schedule: arguments, masks along a curve, their row of the ledger."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.layers.matching import Names, match_rank, select_weights, warn_of_left_out
from lightning_compress.layers.matrix import check_weights_work
from lightning_compress.pruning.masked import MaskedWeights, OneByOne, check_matrices, check_own_weights
from lightning_compress.pruning.masks import check_structure, global_masks, keep_mask
from lightning_compress.pruning.schedules import Schedule, progress, value_at

__all__ = ["ScheduledSparsity"]

Share = Annotated[float, Field(ge=0, lt=1)]


class ScheduledSparsity(Modifier):
    """Base class of modifiers that prune on a schedule.

    Args:
        targets: Modules whose weights are pruned: classes, names, ``re:`` patterns.
        ignore: Modules to leave out of ``targets``.
        init_sparsity: Share of zeros when the window opens, in [0, 1).
        final_sparsity: Share of zeros when it closes (with ``scope="global"`` over all targets together).
        layer_sparsity: Other final sparsities for some targets: ``{"re:.*down_proj": 0.8}``; not with a global scope.
        schedule: Curve of the sparsity from initial to final: ``constant``, ``linear``, ``cosine``, ``cubic``,
            ``polynomial``.
        power: Exponent of ``polynomial``.
        mask_structure: ``unstructured``, ``N:M``, ``block RxC`` or ``channel`` (rows).
        scope: ``layer``: each target loses the same share; ``global``: one ranking over all (``unstructured`` only).
    """

    technique: ClassVar[str]
    """Name of the technique in the ledger."""

    targets: Names = ["Linear"]
    ignore: Names = []
    init_sparsity: Share = 0.0
    final_sparsity: Share = 0.5
    layer_sparsity: dict[str, Share] = Field(default_factory=dict)
    schedule: Schedule = "cubic"
    power: float = Field(default=3.0, gt=0)
    mask_structure: str = "unstructured"
    scope: Literal["layer", "global"] = "layer"

    _weights: MaskedWeights = PrivateAttr(default_factory=lambda: MaskedWeights({}))

    @model_validator(mode="after")
    def _sparsities_fit(self) -> "ScheduledSparsity":
        shares = {f"layer_sparsity[{target!r}]": value for target, value in self.layer_sparsity.items()}
        for name, value in {**shares, "final_sparsity": self.final_sparsity}.items():
            if value < self.init_sparsity:
                raise ValueError(f"{name}={value} is less than init_sparsity={self.init_sparsity}; sparsity only grows")
            check_structure(self.mask_structure, value)
        if self.scope == "global" and (self.mask_structure != "unstructured" or self.layer_sparsity):
            raise ValueError("scope='global' ranks single weights over all targets: unstructured, no layer_sparsity")
        return self

    def claims(self, state: State) -> dict[str, str]:
        if self.start is None:
            return {}
        return dict.fromkeys(select_weights(state.model, self.targets, self.ignore), "choose masks while training for")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the targets; there are no masks yet.

        Raises:
            ValueError: Nothing matches, a weight is not a matrix, or the structure does not divide it. The message
                names the modules.
        """
        model = state.model
        modules = select_weights(model, self.targets, self.ignore)
        check_weights_work(modules, "prune", in_place=True)
        check_matrices(modules, "prune")
        weights, unfit = MaskedWeights(modules), []
        for name, W_RC in weights.matrices().items():
            try:
                keep_mask(W_RC.abs(), 0.5, self.mask_structure)
            except ValueError as error:
                unfit.append(f"{name} ({error})")
        if unfit:
            raise ValueError(f"mask_structure={self.mask_structure!r} does not fit: {'; '.join(unfit[:5])}")
        check_own_weights(model, modules)
        warn_of_left_out(model, modules, self.targets, self.ignore)
        self._weights = weights
        return True

    def sparsity_at(self, index: float) -> float:
        """Progress along the curve at a point in time, in [0, 1]: 0 is ``init_sparsity``, 1 is ``final_sparsity``."""
        assert self.start is not None
        end = self.start if self.end is None else self.end
        return value_at(self.schedule, progress(index, self.start, end), 0.0, 1.0, self.power)

    def masks_at(self, curve: float, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The masks at a point of the curve.

        Args:
            curve: Progress along the curve, from :meth:`sparsity_at`.
            scores: Scores by module name, [R, C] each, float; the lowest are pruned.

        Returns:
            Bool [R, C] by module name, True where the weight survives.
        """
        if self.scope == "global":
            return global_masks(scores, self._between(self.final_sparsity, curve))

        def mask(name: str) -> Tensor:
            return keep_mask(scores[name], self._between(self._final_of(name), curve), self.mask_structure)

        return OneByOne(scores, mask)

    def warn_of_an_early_end(self) -> None:
        """Warn that the run is over before the schedule: it was stopped early, or the window outlasts it."""
        warnings.warn(
            f"{self.name}: the run ended before end={self.end}, when the schedule had reached a sparsity of "
            f"{self._weights.mean_sparsity():.3f}: the model keeps that; train longer, or let the window end earlier",
            stacklevel=3,
        )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        for name, zeros in self._weights.sparsity().items():
            state.ledger.add(name, self.technique, sparsity=zeros, params=self._weights.matrices()[name].numel())
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": self._weights.whole_masks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take the masks, and what belongs to them, from a checkpoint of the run or of the best weights."""
        self._weights.masks = dict(state["masks"])

    def _final_of(self, name: str) -> float:
        """The final sparsity of one target: that of the ``layer_sparsity`` entry which fits it best."""
        module = self._weights.modules[name]
        ranked = [(match_rank(name, module, target), final) for target, final in self.layer_sparsity.items()]
        rank, final = max(ranked, key=lambda pair: pair[0], default=(0, 0.0))
        return final if rank else self.final_sparsity

    def _between(self, final: float, curve: float) -> float:
        return self.init_sparsity + (final - self.init_sparsity) * curve
