r"""Learned N:M masks: training chooses which two of four weights stay, and does not change the weights.

    W' = W m~(l)                                   while training: one soft mask for every optimizer step
    L <- L - lambda sum (W m~)^2                   keeps the remaining weights large, so that gradients do not vanish
    W' = W S_argmax l                              while evaluating, and in the end

Fang et al. 2024, "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", arXiv:2409.17481. The masks
are in modifiers/learned_mask/gumbel.py.

The logits l [R, C / M, K] are parameters of the model before there are optimizers, so the user's optimizer trains them.
Checkpoints hold the dense weights under their own names; logits and masks are in the state of the callback. The noise
of a batch follows from the seed and the number of the batch: a resumed run, a repeated forward pass (activation
checkpointing) and other ranks draw the same.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.dense_keys import original_weight, parametrization_of, put_on, take_off
from lightning_compress.layers.matching import Names, select_weights, warn_of_left_out
from lightning_compress.modifiers.learned_mask.gumbel import patterns, prior_shift
from lightning_compress.modifiers.learned_mask.mask_logits import (
    MaskLogits,
    logits_of,
    noise_seed,
    other_parametrizations,
)
from lightning_compress.modifiers.learned_mask.prior import read_weights
from lightning_compress.pruning.masked import MaskedWeights, check_matrices, check_own_weights, trained_weight
from lightning_compress.pruning.masks import check_columns, check_structure, keep_mask, n_of_m
from lightning_compress.pruning.schedules import progress, value_at

__all__ = ["LearnedMaskModifier"]

MOST_PATTERNS = 100  # 2:4 has 6, 4:8 has 70


class LearnedMaskModifier(Modifier):
    """Learn N:M masks between ``start`` and ``end``; then they are applied for good.

    Args:
        targets: Modules whose masks are learned: classes, names, ``re:`` patterns.
        ignore: Modules to leave out of ``targets``.
        mask_structure: ``N:M``.
        prior: Initial masks: ``magnitude``; None: random; or the path of a sparse model with the same names: a
            ``.safetensors`` file, or a folder with ``model.safetensors``, such as ``+compress=sparsegpt_2of4`` exports.
        prior_strength: How much likelier the pattern of the prior is at the beginning, alpha of the paper; 0: equally
            likely.
        init_std: Initial standard deviation of the logits.
        tau: Temperature at ``start`` and at ``end``; linear between.
        logit_scale: kappa at ``start`` and at ``end``; linear between.
        regularization: Weight lambda of the sum of squares of the masked weights.
        freeze: Parameters that do not train inside the window, besides the logits of masks: ``all`` of the model, as in
            the paper, the weights of the ``targets``, or ``nothing``.
        seed: Seed of the noise.

    Raises:
        ValueError: The window is missing, the structure is not N:M or does not divide a weight, the prior lacks a
            weight, or a module is fake-quantized while its mask is learned. Modules are named.
    """

    needs: ClassVar[Needs] = Needs(checkpoint_state=True, fixed_shapes_from="set-up", parametrizes=True)

    targets: Names = ["Linear"]
    ignore: Names = []
    start: float | None = 0.0
    mask_structure: str = "2:4"
    prior: str | Path | None = "magnitude"
    prior_strength: float = Field(default=3.0, ge=0)
    init_std: float = Field(default=0.01, ge=0)
    tau: tuple[PositiveFloat, PositiveFloat] = (4.0, 0.05)
    logit_scale: tuple[PositiveFloat, PositiveFloat] = (100.0, 500.0)
    regularization: float = Field(default=1e-5, ge=0)
    freeze: Literal["all", "targets", "nothing"] = "all"
    seed: int = 0

    _weights: MaskedWeights = PrivateAttr(default_factory=lambda: MaskedWeights({}))
    _frozen: list[nn.Parameter] = PrivateAttr(default_factory=list)
    _done: bool = PrivateAttr(default=False)  # masks are chosen, weights are zero under them
    _final: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # masks before the best weights came back

    @model_validator(mode="after")
    def _arguments_fit(self) -> "LearnedMaskModifier":
        if self.start is None or self.end is None:
            raise ValueError(
                f"start={self.start}, end={self.end}: masks are learned inside a window of training; give end, such "
                f"as unit='fraction', end=1.0"
            )
        if (pattern := n_of_m(check_structure(self.mask_structure))) is None:
            raise ValueError(f"mask_structure={self.mask_structure!r}: masks are learned for N:M, such as '2:4'")
        if (count := len(patterns(*pattern))) > MOST_PATTERNS:
            raise ValueError(
                f"mask_structure={self.mask_structure!r} has {count} patterns, each with a logit of its own; expected "
                f"at most {MOST_PATTERNS}: 2:4 has 6, 4:8 has 70"
            )
        return self

    @property
    def pattern(self) -> tuple[int, int]:
        """(N, M)."""
        pattern = n_of_m(self.mask_structure)
        assert pattern is not None
        return pattern

    def claims(self, state: State) -> dict[str, str]:
        return dict.fromkeys(select_weights(state.model, self.targets, self.ignore), "choose masks while training for")

    def _fake_quantized(self, name: str) -> str:
        return (
            f"learns the mask of {name!r}, which is fake-quantized at the same time: let quantization start where "
            f"masks are final, at {self.end:g} (unit: {self.unit}), or leave either out"
        )

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        assert self.end is not None
        shared = other.touches(state) & self.touches(state) if other.needs.parametrizes else set()
        if not shared or other.start is None or other.unit != self.unit or other.start >= self.end:
            return None
        return f"it {self._fake_quantized(min(shared))}"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Parametrize the targets with logits, before there are optimizers."""
        self._weights = MaskedWeights(select_weights(state.model, self.targets, self.ignore))
        check_matrices(self._weights.modules, "learn a mask for")
        check_own_weights(state.model, self._weights.modules)
        check_columns({name: W_RC.shape[1] for name, W_RC in self._weights.matrices().items()}, self.mask_structure)
        warn_of_left_out(state.model, self._weights.modules, self.targets, self.ignore)
        priors = self._priors()
        S_KM = patterns(*self.pattern)
        for index, (name, module) in enumerate(self._weights.modules.items()):
            W_RC = self._weights.matrices()[name]
            shape = (W_RC.shape[0], W_RC.shape[1] // self.pattern[1], len(S_KM))
            generator = torch.Generator().manual_seed(noise_seed(self.seed, 0, index))
            logits = self.init_std * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            if name in priors:
                logits += self.init_std * self.prior_strength * prior_shift(priors[name].cpu(), S_KM)
            put_on(module, MaskLogits(module, S_KM, logits.to(W_RC.device)))
        learned = {id(logits_of(module).logits) for module in self._weights.modules.values()}
        targets = {id(trained_weight(module)) for module in self._weights.modules.values()}
        self._frozen = [
            p
            for p in state.model.parameters()
            if id(p) not in learned and (self.freeze == "all" or (self.freeze == "targets" and id(p) in targets))
        ]
        return True

    def _priors(self) -> dict[str, Tensor]:
        """The initial masks, bool [R, C] by module name."""
        if self.prior is None or not self.prior_strength:
            return {}
        matrices = self._weights.matrices()
        if self.prior != "magnitude":
            matrices = read_weights(Path(self.prior), self._weights)
        return {name: keep_mask(W_RC.float().abs(), 0.0, self.mask_structure) for name, W_RC in matrices.items()}

    # -- while training ------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._done:
            for module in self._weights.modules.values():
                logits_of(module).active = True
            self._draw(event)

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        learning = self._started and not self._done
        match event.type_:
            case EventType.BATCH_START:
                self._final = {}  # training goes on, after a test loop in between
                self._set_in_batch(True)
                if learning:
                    self._draw(event)
            case EventType.BATCH_END:
                self._set_in_batch(False)
            case EventType.LOSS_CALCULATED if learning and self.regularization:
                self._regularize(state, event)
            case EventType.OPTIM_PRE_STEP if learning:
                for parameter in self._frozen:
                    parameter.grad = None  # requires_grad stays, for DDP
            case EventType.OPTIM_PRE_STEP:
                self._weights.apply_to_gradients()
            case EventType.OPTIM_POST_STEP:
                self._weights.apply_to_weights()

    def _set_in_batch(self, in_batch: bool) -> None:
        """Reentrant gradient checkpointing runs the first pass of a training batch without gradients."""
        for module in self._weights.modules.values():
            if (logits := parametrization_of(module, MaskLogits)) is not None:
                logits.in_batch = in_batch

    def interrupt(self) -> None:
        self._set_in_batch(False)
        super().interrupt()

    def _draw(self, event: Event) -> None:
        """Set temperature, scale and noise for this batch."""
        assert self.start is not None
        assert self.end is not None
        p = progress(event.current_index, self.start, self.end)
        for index, (name, module) in enumerate(self._weights.modules.items()):
            logits = logits_of(module)
            if any(getattr(other, "active", False) for other in other_parametrizations(module)):
                raise ValueError(f"{self.name} {self._fake_quantized(name)}")
            logits.tau.fill_(value_at("linear", p, *self.tau))
            logits.kappa.fill_(value_at("linear", p, *self.logit_scale))
            logits.seed = noise_seed(self.seed, event.global_batch + 1, index)

    def _regularize(self, state: State, event: Event) -> None:
        assert state.loss is not None
        total = torch.zeros((), device=state.loss.device, dtype=torch.float32)
        for module in self._weights.modules.values():
            logits, weight = logits_of(module), original_weight(module)
            total = total + (weight.float() * logits.like(logits.soft(), weight).float()).square().sum()
        state.loss.add_(-self.regularization * total.to(state.loss) / event.batches_per_step)

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._done:  # else it is resumed past the end
            self._apply(self._hard_masks())

    def _hard_masks(self) -> dict[str, Tensor]:
        return {name: logits_of(module).hard() for name, module in self._weights.modules.items()}

    def _apply(self, masks: Mapping[str, Tensor]) -> None:
        """Write zeros into the weights for good; parametrizations pass the weight on unchanged from now on."""
        for module in self._weights.modules.values():
            if (logits := parametrization_of(module, MaskLogits)) is not None:
                logits.active = False
        self._weights.set(masks)
        self._done = True

    # -- the end -------------------------------------------------------------------------------------------------------

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back; restore the logits that they were saved with."""
        if self._started and not state["started"]:
            self._final = dict(self._weights.masks) or self._hard_masks()
            return
        self._restore(state)

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._final:
            warnings.warn(
                f"{self.name}: the best checkpoint was saved before start={self.start} (unit: {self.unit}): its dense "
                f"weights get the masks of the last step; set load_best=False, or start earlier",
                stacklevel=2,
            )
        elif not self._done and event.global_step == 0 and self._started:
            warnings.warn(
                f"{self.name}: no training step was made, so that the masks are the initial ones (prior: "
                f"{self.prior}); they are learned in Trainer.fit",
                stacklevel=2,
            )
        self._apply_last()

    def _apply_last(self) -> None:
        """Apply the final masks, also after weights were loaded."""
        if self._started or self._resumed or self._done:
            self._apply(self._final or (self._weights.masks if self._done else self._hard_masks()))
        self._final = {}

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Remove the logits, equally on every rank."""
        with torch.inference_mode(False), torch.no_grad():
            self._apply_last()
            for name, module in self._weights.modules.items():
                if parametrization_of(module, MaskLogits) is not None:
                    take_off(module, MaskLogits, leave_parametrized=False)
                zeros = self._weights.sparsity()[name]
                flag = None if self._done else "never started; left as it was"
                state.ledger.add(name, "learned mask", sparsity=zeros, flag=flag)
        self._frozen = []
        return True

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        logits = {
            name: parametrization.logits.detach().clone()
            for name, module in self._weights.modules.items()
            if (parametrization := parametrization_of(module, MaskLogits)) is not None
        }
        return {**super().state_dict(), "logits": logits, "masks": dict(self._weights.masks), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restore(state)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        self._weights.masks, self._done = dict(state["masks"]), state["done"]
        for name, module in self._weights.modules.items():
            if (logits := parametrization_of(module, MaskLogits)) is not None:
                if name in state["logits"]:
                    logits.logits.copy_(state["logits"][name])
                logits.active = (state["started"] or self._started) and not self._done
