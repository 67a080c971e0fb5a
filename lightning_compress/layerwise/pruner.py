"""What pruners on calibration data share: which layers, how sparse each becomes, their row of the ledger."""

import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Needs, State
from lightning_compress.layers.finite import check_finite
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows, write_matrix
from lightning_compress.layerwise.layer import Layer, Solved
from lightning_compress.layerwise.loss_shares import LossSurvey
from lightning_compress.layerwise.modifier import LayerwiseModifier
from lightning_compress.layerwise.owl import OutlierSurvey
from lightning_compress.layerwise.recovery import Recovery
from lightning_compress.layerwise.token_weights import GRADIENTS, UNSHARDED
from lightning_compress.pruning.arguments import PruningArguments, share_of_zeros
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.weight_metrics import sqnr_db, weight_error

__all__ = ["LayerwisePruner"]


class LayerwisePruner(PruningArguments, LayerwiseModifier):
    """Base class of modifiers that prune layers from the Hessian of their inputs: implement ``solve``.

    Args:
        recovery_epochs: After a block is pruned, passes over the batches in which each of its modules that hold pruned
            layers (attention, MLP) learns its output in the dense model, by the weights that stay; 0: none.
        recovery_rate: Relative size of a step at the start of the recovery.
    """

    recovery_epochs: int = Field(default=0, ge=0)
    recovery_rate: float = Field(default=1e-3, gt=0)

    _recovery: Recovery | None = PrivateAttr(default=None)
    _survey: OutlierSurvey | LossSurvey | None = PrivateAttr(default=None)
    _surveyed: set[str] = PrivateAttr(default_factory=set)
    _sparsities: dict[str, float] = PrivateAttr(
        default_factory=dict
    )  # of single layers, where the profile makes them differ

    @model_validator(mode="after")
    def _gradients_are_of_one_loss(self) -> "LayerwisePruner":
        profile, objective = self.sparsity_profile, self.token_objective
        if profile not in (None, "owl", objective) and objective != "layer":
            raise ValueError(
                f"sparsity_profile={profile!r} and objective={objective!r} need gradients of two losses, and one "
                f"survey has those of one: give both the same"
            )
        return self

    @model_validator(mode="after")
    def _recovery_is_used(self) -> "LayerwisePruner":
        if not self.recovery_epochs and (names := self.changed({"recovery_rate"})):
            raise ValueError(f"{', '.join(names)} without recovery_epochs would do nothing; give such as 2")
        return self

    @property
    def needs(self) -> Needs:
        gradients = GRADIENTS[self.token_objective] or GRADIENTS.get(self.sparsity_profile or "layer")
        survey = self.sparsity_profile is not None or gradients is not None
        sharded = True if gradients is None else UNSHARDED
        recovers = self.recovery_epochs > 0
        return Needs(
            data=True, one_pass=True, own_pass=True, survey=survey, gradients=gradients, team="sums", sharded=sharded,
            replay=recovers, dense_inputs=recovers or self.aims_at_dense,
        )  # fmt: skip

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.find(model)

    def set_up(self) -> None:
        if self.sparsity_profile == "owl":
            self._survey = OutlierSurvey(self._layers, self.owl_m)
        elif self.sparsity_profile is not None:
            self._survey = LossSurvey(self._layers)
            self._survey.watch(self)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        if self.recovery_epochs:
            self._recovery = Recovery(state.model, self._layers, self.recovery_epochs, self.recovery_rate)
            self._recovery.watch(self, state.model)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_block_end(state, event, **kwargs)
        results = self._recovery.recover(state, self) if self._recovery is not None else {}
        for name, result in results.items():
            gain = f"error of its output on held-out batches {result.began:.3g}, recovered {result.ended:.3g}"
            state.ledger.add(name, "recovery", error=result.ended, flag=gain)

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        super().load_group_state(modules, state)
        if self._recovery is not None:
            self._recovery.drop(modules)

    def survey_state(self) -> dict[str, Tensor] | None:
        return self._survey.state_dict() | (super().survey_state() or {}) if self._survey else super().survey_state()

    def load_survey_state(self, state: dict[str, Tensor]) -> None:
        super().load_survey_state(state)
        if self._survey is not None:
            self._survey.load_state_dict(state)

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_block_surveyed(state, event, **kwargs)
        if self._survey is None:
            return
        names = [name for name in state.modules if name in self._layers]
        self._survey.close(state.block_name, names, state.team)
        self._sparsities = self._survey.sparsities(self.mean_sparsity, self.owl_lmbda)
        self._surveyed.update(names)

    def sees_dense(self, name: str) -> bool:
        return super().sees_dense(name) or (self._survey is not None and name not in self._surveyed)

    def survey(self, name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(self._survey, OutlierSurvey):
            self._survey.observe(name, inputs_as_rows(module, x, self.token_mask))

    def sparsity_in(self, layer: Layer) -> float:
        """The share of its weights that a layer loses."""
        return self._sparsities.get(layer.name, self.sparsity_of(layer.name, layer.module))

    def check(self, name: str, module: nn.Module) -> None:
        if Quantized.of(module) is not None:
            raise ValueError(f"{name!r} is quantized already: put {self.name} before what quantizes it")
        check_finite({name: module})

    def write(self, layer: Layer, solved: Solved) -> dict[str, Any]:
        facts = {
            "scheme": self.mask_structure,
            "sparsity": share_of_zeros(solved.W_RC),
            "sqnr_db": sqnr_db(weight_error(layer.W_RC, solved.W_RC)),
            "params": layer.W_RC.numel(),
        }
        write_matrix(layer.module, solved.W_RC)
        return facts

    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        for name, module in layers.items():
            W_RC = as_matrix(module)
            facts = {"sparsity": share_of_zeros(W_RC), "params": W_RC.numel(), "tokens": 0}
            state.ledger.add(name, self.technique, flag="never saw data; left as it was", **facts)
        warnings.warn(
            f"{self.name}: {', '.join(layers)} never saw data and were left as they were, not pruned; were they "
            f"called, in these batches, as modules of their own? (nn.MultiheadAttention uses the weight of its "
            f"out_proj directly)",
            stacklevel=2,
        )

    def reset(self) -> None:
        super().reset()
        self._survey, self._surveyed, self._sparsities, self._recovery = None, set(), {}, None
