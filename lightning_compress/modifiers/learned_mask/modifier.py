r"""Learned N:M masks: which two of four weights stay is trained, the weights themselves are not.

    W' = W m~(l)                                   while training: one soft mask for every optimizer step
    L <- L - lambda sum (W m~)^2                   weights that stay shall be large, so that gradients stay alive
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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.dense_keys import original_weight, parametrization_of, put_on, take_off
from lightning_compress.layers.matching import Names, select_weights, warn_of_left_out
from lightning_compress.layers.matrix import is_transposed
from lightning_compress.modifiers.learned_mask.gumbel import gumbel, hard_mask, patterns, prior_shift, soft_mask
from lightning_compress.pruning.masked import MaskedWeights, check_own_weights, has_matrix, trained_weight
from lightning_compress.pruning.masks import check_structure, keep_mask, n_of_m
from lightning_compress.pruning.schedules import progress, value_at

__all__ = ["LearnedMaskModifier", "MaskLogits"]

MOST_PATTERNS = 100  # 2:4 has 6, 4:8 has 70


class MaskLogits(nn.Module):
    """The parametrization of a weight: dense while it sleeps, times a soft or a hard mask while it is ``active``.

    Args:
        module: The layer, its weight still dense.
        S_KM: The patterns.
        logits: Where they begin, float32 [R, C / M, K].
    """

    passes_in_the_end = True  # see layers/matrix.py
    keeps_zeros = True  # see pruning/masked.py

    def __init__(self, module: nn.Module, S_KM: Tensor, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.S_KM, self.transposed = S_KM, is_transposed(module)
        self.active = False
        self.in_batch = False  # of training; also what runs without gradients
        # tensors: numbers would compile anew each step
        self.kappa, self.tau = (torch.ones((), dtype=torch.float32) for _ in range(2))
        self.seed = 0

    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            # DDP waits for the gradient of every parameter, and gets zeros
            unused = 0 * self.logits.sum().to(weight.dtype) if torch.is_grad_enabled() else None
            return weight.view_as(weight) if unused is None else weight + unused  # a view: no second owner of it
        soft = self.in_batch or torch.is_grad_enabled()  # modes say nothing: see from_pretrained
        mask = self.soft() if soft else self.hard()
        return weight * self.like(mask, weight)

    def soft(self) -> Tensor:
        """The mask of this batch, [R, C]."""
        device = self.logits.device
        self.S_KM, self.kappa, self.tau = self.S_KM.to(device), self.kappa.to(device), self.tau.to(device)
        return soft_mask(self.logits, self._noise(), self.kappa, self.tau, self.S_KM)

    def hard(self) -> Tensor:
        """The mask that is most likely, bool [R, C]."""
        self.S_KM = self.S_KM.to(self.logits.device)
        return hard_mask(self.logits.detach(), self.S_KM)

    def like(self, mask_RC: Tensor, weight: Tensor) -> Tensor:
        mask = mask_RC.t() if self.transposed else mask_RC.reshape(weight.shape)
        return mask.to(weight.dtype)

    @torch.compiler.disable  # a generator cannot be traced
    def _noise(self) -> Tensor:
        return gumbel(tuple(self.logits.shape), self.seed, self.logits.device)


class LearnedMaskModifier(Modifier):
    """Learn N:M masks between ``start`` and ``end``; then they are worn for good.

    Args:
        targets: Modules whose masks are learned: classes, names, ``re:`` patterns.
        ignore: What to leave out of ``targets``.
        mask_structure: ``N:M``.
        prior: Where masks begin: ``magnitude``; None: by chance; or the path of a sparse model (a ``.safetensors``
            file, or a folder with ``model.safetensors``, such as ``+compress=sparsegpt_2of4`` exports), same names.
        prior_strength: How likely the prior's pattern is in the beginning, alpha of the paper; 0: no more than others.
        init_std: Standard deviation of the logits in the beginning.
        tau: Temperature at ``start`` and at ``end``; linear between.
        logit_scale: kappa at ``start`` and at ``end``; linear between.
        regularization: lambda, of the sum of squares of what stays.
        freeze: What stands still inside the window beside the masks' logits: ``all`` parameters of the model, as in the
            paper, the weights of the ``targets``, or ``nothing``.
        seed: Of the noise.

    Raises:
        ValueError: There is no window, the structure is no N:M or does not divide a weight, the prior lacks a weight; a
            module is fake-quantized while its mask is learned. Modules are named.
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
        found = n_of_m(self.mask_structure)
        assert found is not None
        return found

    def claims(self, state: State) -> dict[str, str]:
        assert state.model is not None
        return dict.fromkeys(select_weights(state.model, self.targets, self.ignore), "choose masks while training for")

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        assert self.end is not None
        shared = other.touches(state) & self.touches(state) if other.needs.parametrizes else set()
        if not shared or other.start is None or other.unit != self.unit or other.start >= self.end:
            return None
        return (
            f"it learns the mask of {sorted(shared)[0]!r}, which is fake-quantized at the same time: let quantization "
            f"start where masks are done, at {self.end:g} (unit: {self.unit}), or leave either out"
        )

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Put the logits on, before there are optimizers."""
        assert state.model is not None
        self._weights = MaskedWeights(select_weights(state.model, self.targets, self.ignore))
        self._check(state.model)
        warn_of_left_out(state.model, self._weights.modules, self.targets, self.ignore)
        priors = self._priors()
        S_KM = patterns(*self.pattern)
        for place, (name, module) in enumerate(self._weights.modules.items()):
            W_RC = self._weights.matrices()[name]
            shape = (W_RC.shape[0], W_RC.shape[1] // self.pattern[1], len(S_KM))
            generator = torch.Generator().manual_seed(_seed(self.seed, 0, place))
            logits = self.init_std * torch.randn(shape, generator=generator, dtype=torch.float32)
            if name in priors:
                logits += self.init_std * self.prior_strength * prior_shift(priors[name].cpu(), S_KM)
            put_on(module, MaskLogits(module, S_KM, logits.to(W_RC.device)))
        learned = {id(_logits(module).logits) for module in self._weights.modules.values()}
        held = {id(trained_weight(module)) for module in self._weights.modules.values()}
        self._frozen = [
            p
            for p in state.model.parameters()
            if id(p) not in learned and (self.freeze == "all" or (self.freeze == "targets" and id(p) in held))
        ]
        return True

    def _check(self, model: nn.Module) -> None:
        m = self.pattern[1]
        for name, module in self._weights.modules.items():
            if not has_matrix(module):
                raise ValueError(
                    f"cannot learn a mask for {name} ({type(module).__name__}): expected a weight of two or more "
                    f"dimensions; add it to ignore"
                )
        check_own_weights(model, self._weights.modules)
        widths = {name: W_RC.shape[1] for name, W_RC in self._weights.matrices().items()}
        if unfit := [f"{name} ({C})" for name, C in widths.items() if C % m]:
            raise ValueError(
                f"mask_structure={self.mask_structure!r} does not divide the columns of {', '.join(unfit[:5])}; add "
                f"them to ignore, or choose another pattern"
            )

    def _priors(self) -> dict[str, Tensor]:
        """The masks to begin with, bool [R, C] by module name."""
        if self.prior is None or not self.prior_strength:
            return {}
        matrices = self._weights.matrices()
        if self.prior != "magnitude":
            matrices = _read(Path(self.prior), self._weights)
        return {name: keep_mask(W_RC.float().abs(), 0.0, self.mask_structure) for name, W_RC in matrices.items()}

    # -- while training ------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._done:
            for module in self._weights.modules.values():
                _logits(module).active = True
            self._draw(event)

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        learning = self._started and not self._done
        match event.type_:
            case EventType.BATCH_START:
                self._final = {}  # training goes on, after a test in between
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
        """This batch's temperature, scale and noise."""
        assert self.start is not None
        assert self.end is not None
        p = progress(event.current_index, self.start, self.end)
        for place, (name, module) in enumerate(self._weights.modules.items()):
            logits = _logits(module)
            if any(getattr(part, "active", False) for part in _others(module)):
                raise ValueError(
                    f"{self.name} learns the mask of {name!r}, which is fake-quantized at the same time: let "
                    f"quantization start where masks are done, at {self.end:g} (unit: {self.unit}), or leave either out"
                )
            logits.tau.fill_(value_at("linear", p, *self.tau))
            logits.kappa.fill_(value_at("linear", p, *self.logit_scale))
            logits.seed = _seed(self.seed, event.global_batch + 1, place)

    def _regularize(self, state: State, event: Event) -> None:
        assert state.loss is not None
        total = torch.zeros((), device=state.loss.device, dtype=torch.float32)
        for module in self._weights.modules.values():
            logits, weight = _logits(module), original_weight(module)
            total = total + (weight.float() * logits.like(logits.soft(), weight).float()).square().sum()
        state.loss.add_(-self.regularization * total.to(state.loss) / event.batches_per_step)

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._done:  # else it is resumed past the end
            self._wear(self._chosen())

    def _chosen(self) -> dict[str, Tensor]:
        return {name: _logits(module).hard() for name, module in self._weights.modules.items()}

    def _wear(self, masks: Mapping[str, Tensor]) -> None:
        """Zeros into the weights, for good; what is parametrized still passes the weight as it is."""
        for module in self._weights.modules.values():
            if (logits := parametrization_of(module, MaskLogits)) is not None:
                logits.active = False
        self._weights.set(masks)
        self._done = True

    # -- the end -------------------------------------------------------------------------------------------------------

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back, and so are the logits that they were saved with."""
        if self._started and not state["started"]:
            self._final = dict(self._weights.masks) or self._chosen()
            return
        self._take(state)

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._final:
            warnings.warn(
                f"{self.name}: the best checkpoint was saved before start={self.start} (unit: {self.unit}): its dense "
                f"weights get the masks of the last step; set load_best=False, or start earlier",
                stacklevel=2,
            )
        elif not self._done and event.global_step == 0 and self._started:
            warnings.warn(
                f"{self.name}: no training step was made, so that the masks are those it begins with (prior: "
                f"{self.prior}); they are learned in Trainer.fit",
                stacklevel=2,
            )
        self._wear_last()

    def _wear_last(self) -> None:
        """The masks that there are in the end, whatever was loaded in between."""
        if self._started or self._resumed or self._done:
            self._wear(self._final or (self._weights.masks if self._done else self._chosen()))
        self._final = {}

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Take the logits off; the same on every rank."""
        with torch.inference_mode(False), torch.no_grad():
            self._wear_last()
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
            name: found.logits.detach().clone()
            for name, module in self._weights.modules.items()
            if (found := parametrization_of(module, MaskLogits)) is not None
        }
        return {**super().state_dict(), "logits": logits, "masks": dict(self._weights.masks), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._take(state)

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        self._weights.masks, self._done = dict(state["masks"]), state["done"]
        for name, module in self._weights.modules.items():
            if (found := parametrization_of(module, MaskLogits)) is not None:
                if name in state["logits"]:
                    found.logits.copy_(state["logits"][name])
                found.active = (state["started"] or self._started) and not self._done


def _logits(module: nn.Module) -> MaskLogits:
    found = parametrization_of(module, MaskLogits)
    assert found is not None
    return found


def _others(module: nn.Module) -> list[nn.Module]:
    parts = module.get_submodule("parametrizations.weight").children()
    return [part for part in parts if not isinstance(part, MaskLogits)]


def _seed(seed: int, batch: int, place: int) -> int:
    """One number for the noise of one module in one batch; neighbours are far apart."""
    mixed = seed
    for part in (batch, place):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def _read(path: Path, weights: MaskedWeights) -> dict[str, Tensor]:
    """The weights [R, C] of a sparse model, by module name."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists() or file.suffix != ".safetensors":
        raise ValueError(
            f"prior={str(path)!r}: expected 'magnitude', a .safetensors file, or a folder that holds model.safetensors"
        )
    read = {}
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"prior={str(path)!r}: {file.name} is not a whole safetensors file: {error}") from error
    with opened as stored:
        names = set(stored.keys())
        for name, W_RC in weights.matrices().items():
            if f"{name}.weight" not in names:
                raise ValueError(
                    f"prior={str(path)!r} has no {name}.weight; it holds {len(names)} tensors, such as "
                    f"{', '.join(sorted(names)[:3])}: give a dense-format model with the names of this one"
                )
            weight = stored.get_tensor(f"{name}.weight")
            matrix = weight.t() if is_transposed(weights.modules[name]) else weight.flatten(1)
            if matrix.shape != W_RC.shape:
                raise ValueError(
                    f"prior={str(path)!r}: {name}.weight is {tuple(matrix.shape)} as a matrix, and in this model "
                    f"{tuple(W_RC.shape)}; give the same model, sparse"
                )
            read[name] = matrix
    return read
