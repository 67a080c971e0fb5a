"""The arguments that modifiers share which prune on a schedule: what, how much, along which curve."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from lightning_compress.layers.matching import Names, match_rank, select_weights, warn_of_left_out
from lightning_compress.layers.matrix import check_weights_work
from lightning_compress.pruning.masked import MaskedWeights, check_own_weights, has_matrix
from lightning_compress.pruning.masks import check_structure, global_masks, keep_mask
from lightning_compress.pruning.schedules import Schedule, progress, value_at

__all__ = ["ScheduledSparsity"]

Share = Annotated[float, Field(ge=0, lt=1)]


class ScheduledSparsity(BaseModel):
    """Mixin of modifiers.

    Args:
        targets: Modules whose weights are pruned: classes, names, ``re:`` patterns.
        ignore: What to leave out of ``targets``.
        init_sparsity: Share of zeros when the window opens, in [0, 1).
        final_sparsity: Share of zeros when it closes (with ``scope="global"`` over all targets together).
        layer_sparsity: Other final sparsities for some targets: ``{"re:.*down_proj": 0.8}``; not with a global scope.
        schedule: How sparsity goes from the first to the last: ``constant``, ``linear``, ``cosine``, ``cubic``,
            ``polynomial``.
        power: Exponent of ``polynomial``.
        mask_structure: ``unstructured``, ``N:M``, ``block RxC`` or ``channel`` (rows).
        scope: ``layer``: each target loses the same share; ``global``: one ranking over all (``unstructured`` only).
    """

    start: float | None = None  # that of the modifier
    targets: Names = ["Linear"]
    ignore: Names = []
    init_sparsity: Share = 0.0
    final_sparsity: Share = 0.5
    layer_sparsity: dict[str, Share] = Field(default_factory=dict)
    schedule: Schedule = "cubic"
    power: float = Field(default=3.0, gt=0)
    mask_structure: str = "unstructured"
    scope: Literal["layer", "global"] = "layer"

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

    def claims(self, state: Any) -> dict[str, str]:
        """While training, one modifier chooses a module's masks: :meth:`lightning_compress.core.Modifier.claims`."""
        if self.start is None:
            return {}
        return dict.fromkeys(select_weights(state.model, self.targets, self.ignore), "choose masks while training for")

    def find(self, model: nn.Module) -> MaskedWeights:
        """The targets, with no masks yet.

        Raises:
            ValueError: Nothing matches, or a weight is no matrix, or the structure does not divide it (all are named).
        """
        modules = select_weights(model, self.targets, self.ignore)
        check_weights_work(modules, "prune", in_place=True)
        if other := [f"{name} ({type(m).__name__})" for name, m in modules.items() if not has_matrix(m)]:
            raise ValueError(
                f"cannot prune {', '.join(other[:5])}: expected modules with a weight of two or more dimensions; add "
                f"them to ignore"
            )
        found, unfit = MaskedWeights(modules), []
        for name, W_RC in found.matrices().items():
            try:
                keep_mask(W_RC.abs(), 0.5, self.mask_structure)
            except ValueError as error:
                unfit.append(f"{name} ({error})")
        if unfit:
            raise ValueError(f"mask_structure={self.mask_structure!r} does not fit: {'; '.join(unfit[:5])}")
        check_own_weights(model, modules)
        warn_of_left_out(model, modules, self.targets, self.ignore)
        return found

    def curve_at(self, index: float, start: float, end: float | None) -> float:
        """Progress along the curve, in [0, 1]: 0 is ``init_sparsity``, 1 is ``final_sparsity``."""
        return value_at(self.schedule, progress(index, start, start if end is None else end), 0.0, 1.0, self.power)

    def masks_at(
        self, curve: float, scores: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> dict[str, Tensor]:
        """The masks at a point of the curve.

        Args:
            curve: As :meth:`curve_at` gives it.
            scores: By module name, [R, C] each, float; the lowest go.
            modules: The modules of those names.

        Returns:
            Bool [R, C] by module name, True where the weight survives.
        """
        if self.scope == "global":
            return global_masks(scores, self._between(self.final_sparsity, curve))
        return {
            name: keep_mask(S_RC, self._between(self.final_of(name, modules[name]), curve), self.mask_structure)
            for name, S_RC in scores.items()
        }

    def warn_of_an_early_end(self, name: str, zeros: float, end: float | None) -> None:
        """The run is over, and the schedule is not: a run that was stopped early, or a window that outlasts it."""
        warnings.warn(
            f"{name}: the run ended before end={end}, where the schedule would have, at a sparsity of {zeros:.3f}: "
            f"that is what is left behind; train longer, or let the window end earlier",
            stacklevel=3,
        )

    def final_of(self, name: str, module: nn.Module) -> float:
        """The final sparsity of one target: that of the ``layer_sparsity`` entry which fits it best."""
        ranked = [(match_rank(name, module, target), final) for target, final in self.layer_sparsity.items()]
        rank, final = max(ranked, key=lambda pair: pair[0], default=(0, 0.0))
        return final if rank else self.final_sparsity

    def _between(self, final: float, curve: float) -> float:
        return self.init_sparsity + (final - self.init_sparsity) * curve
