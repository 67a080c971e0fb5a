r"""Quantization-aware training: the model trains with its weights (and activations) on the grid of the export.

    forward     y = Q(x) Q(W)^T                 what the exported model computes, bit for bit
    backward    straight through, clipped       "ste": Bengio et al. 2013, arXiv:1308.3432; scales follow the weights
                with a gradient for the scale   "lsq": Esser et al. 2020, arXiv:1902.08153

The optimizer trains the dense weights, and with "lsq" the scales; checkpoints hold the dense weights under their own
names. The equations are in ops/fake_quant/reference.py.
"""

import warnings
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.dense_keys import original_weight
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.matrix import as_matrix, check_weights_work
from lightning_compress.layers.sharded import gathered, is_sharded
from lightning_compress.layers.split_experts import join, split
from lightning_compress.layers.weight_slice import WeightSlice, owner_of
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.batch_norm import fold_all
from lightning_compress.quant.embeddings import Embeddings, check_trainable
from lightning_compress.quant.observers import is_observed
from lightning_compress.quant.parametrization import (
    FakeQuantize,
    Lifted,
    fake_quantize_of,
    finish,
    lift,
    lower,
    parametrize_weight,
    restore_dense,
)
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe
from lightning_compress.quant.shared_scales import fused_with
from lightning_compress.quant.weight_metrics import weight_error, weight_facts
from lightning_compress.team import Team

__all__ = ["QATModifier"]


class QATModifier(QuantizationArguments, Modifier):
    """Train through fake-quantization; the trained model is quantized.

    On a model that is quantized already (by ``compress`` or ``load``) training starts from its scales; targets and
    scheme must be the same as before.

    ``targets``, ``ignore``, ``scheme``, ``group_size`` and ``config_groups`` are those of
    :class:`~lightning_compress.quant.arguments.QuantizationArguments`.

    Args:
        gradient: ``lsq``: the optimizer trains the scales too. ``ste``: it does not, scales follow the weights.
        scale_search: Scales at ``start``: from each group's extremes (``minmax``), or those with the least
            sum |w - q|^2.4 (``mse``).
        observe_until: When static activation scales, and scales that follow the weights, stop following, in ``unit``;
            by default at the end.
        averaging_constant: Weight of the newest batch's extremes in static activation scales.
        freeze_bn_at: When BatchNorm layers switch to their running statistics, in ``unit``; by default never.
        fold_batchnorm: Fold BatchNorm layers into the layers before them at set-up, before there are optimizers; a
            shift remains of each, in evaluation mode from then on. For models that are trained already.
        learn_activations: From ``observe_until`` on the optimizer trains static activation scales, like those of
            ``lsq``.
        start: When fake-quantization begins, in ``unit``; before, the model trains without it.
        end: When all scales stop changing, learned ones too; fake-quantization stays on.

    Raises:
        ValueError: A value is not possible; targets cannot be quantized; the model is quantized already, in another
            way. The message names the modules.
    """

    needs: ClassVar[Needs] = Needs(checkpoint_state=True, fixed_shapes_from="set-up", parametrizes=True, sharded=True)
    embeddings: ClassVar[Embeddings] = "alone"
    every_format: ClassVar[bool] = True

    start: float | None = 0.0
    gradient: Literal["lsq", "ste"] = "lsq"
    scale_search: Literal["minmax", "mse"] = "minmax"
    observe_until: float | None = None
    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    freeze_bn_at: float | None = None
    fold_batchnorm: bool = False
    learn_activations: bool = False

    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _norms: list[nn.Module] = PrivateAttr(default_factory=list)
    _folded: list[nn.Module] = PrivateAttr(default_factory=list)
    _observing: bool = PrivateAttr(default=True)
    _awaited: set[str] = PrivateAttr(default_factory=set)  # modules that another quantizer will hand over
    _lifted: dict[str, Lifted] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _moments_fit(self) -> "QATModifier":
        if self.start is None:
            raise ValueError("start=None: quantization-aware training needs a window; leave start out, or give start=0")
        inputs = [scheme.input_activations for scheme in self.schemes]
        if self.learn_activations and all(args is None or args.dynamic for args in inputs):
            raise ValueError(
                "learn_activations=True, but no scheme has static activations (dynamic ones follow each input); leave "
                "it out, or give a scheme such as config_groups with input_activations: {dynamic: false}"
            )
        if self.learn_activations and self.observe_until is None:
            raise ValueError("learn_activations=True needs observe_until: scales are observed before it, learned after")
        for name, value in (("observe_until", self.observe_until), ("freeze_bn_at", self.freeze_bn_at)):
            if value is not None and value < self.start:
                raise ValueError(f"{name}={value} lies before start={self.start} (unit: {self.unit})")
        return self

    def takes_over(self, earlier: Modifier, modules: set[str], state: State) -> bool:
        """True for a quantizer with the same window and the same grids: training starts from its result.

        Raises:
            ValueError: The quantizer has another window or other grids.
        """
        if not isinstance(earlier, QuantizationArguments):
            return False
        if (earlier.start, earlier.unit) != (self.start, self.unit):
            raise ValueError(
                f"{self.name} continues from {earlier.name}, but has start={self.start} (unit: {self.unit}), and "
                f"{earlier.name} start={earlier.start} (unit: {earlier.unit}); give both the same"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on_initialize warns again
            before, now = earlier.assign(state.model), self.assign(state.model)
        for name in sorted(modules & before.keys() & now.keys()):
            if _grids(before[name]) != _grids(now[name]):
                raise ValueError(
                    f"{self.name} continues from {earlier.name}, which quantizes {name!r} as {describe(before[name])}, "
                    f"but has the scheme {describe(now[name])}; give both the same scheme"
                )
        self._awaited |= modules
        return True

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Parametrize the targets, before there are optimizers."""
        model = state.model
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if self.freeze_bn_at is not None and not self._norms:
            warnings.warn(f"freeze_bn_at={self.freeze_bn_at}, but the model has no BatchNorm layers", stacklevel=2)
        if self.fold_batchnorm:
            self._folded = [model.get_submodule(folding.norm) for folding in fold_all(model)]
        records = {clean_name(name): pair for name, pair in Quantized.find(model).items()}
        for module, _ in records.values():
            Quantized.detach(module)
        split(model)
        try:
            schemes = self.assign(model)
            check_weights_work({name: model.get_submodule(name) for name in schemes}, "train", in_place=True)
            _check_records(records, schemes)
            check_trainable({name: model.get_submodule(name) for name in schemes})
        except BaseException:
            for module, record in records.values():
                record.attach(module)
            join(model)
            raise
        named = {clean_name(name): module for name, module in model.named_modules()}
        self._modules = {name: named[name] for name in schemes}
        inputs = (self.averaging_constant, self.learn_activations)
        for name, scheme in schemes.items():
            module = self._modules[name]
            start = records[name][1] if name in records else None
            fake = FakeQuantize(module, scheme, self.gradient, self.scale_search, start, *inputs)
            parametrize_weight(module, fake, start)
        join(model)
        return True

    # -- while training -----------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name, module in self._modules.items():
            if isinstance(module, WeightSlice) and is_sharded(module.home):
                raise ValueError(
                    f"{name!r} is a part of a tensor that is sharded, and {self.name} trains such parts (experts, "
                    f"recurrent weights) on whole tensors alone; train with strategy='ddp' or on one device, or add "
                    f"them to ignore"
                )
        names = [name for name in self._modules if name not in self._awaited]
        if not self.resumed:
            self._derive(names)
        for name in names:
            _fake(self._modules[name]).active = True

    def _derive(self, names: Collection[str]) -> None:
        """Compute scales from the weights; of NVFP4 with one global scale for weights that servers fuse."""
        for name in names:
            with gathered(owner_of(self._modules[name])):
                _fake(self._modules[name]).derive(original_weight(self._modules[name]))
        for name, least in self._least_global_scales(_global_scale).items():
            if name in names and bool(least != _global_scale(fake := _fake(self._modules[name]))):
                with gathered(owner_of(self._modules[name])):
                    fake.derive(original_weight(self._modules[name]), least)

    def _least_global_scales(self, each: Callable[[FakeQuantize], Tensor]) -> dict[str, Tensor]:
        """The least of ``each`` global scale among the weights that servers fuse, by name of NVFP4 modules."""
        scales = {n: each(fake) for n, m in self._modules.items() if (fake := _fake(m)).global_scale is not None}
        return {n: torch.stack([scales[o] for o in fused_with(n, scales)]).amin(0) for n in scales}

    def _widen_global_scales(self) -> None:
        """Halve global scales where the largest scale of a weight has outgrown what can be stored."""
        for name, least in self._least_global_scales(FakeQuantize.fitting_global_scale).items():
            fake = _fake(self._modules[name])
            if not fake.frozen:
                _global_scale(fake).copy_(least)

    def make_room(self) -> None:
        """Give the modules back, without parametrizations, to the quantizer that training continues from."""
        self._lifted = {name: lift(self._modules[name]) for name in sorted(self._awaited & self._modules.keys())}

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        for name, lifted in self._lifted.items():
            module = self._modules[name]
            record = Quantized.of(module)
            Quantized.detach(module)
            lower(module, lifted, record)
            lifted.fake.active = self._started
        self._lifted, self._awaited = {}, set()

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            frozen = self.freeze_bn_at is not None and event.current_index >= self.freeze_bn_at
            for norm in self._norms if frozen else self._folded:
                norm.eval()  # each batch: the Trainer calls model.train()
            if self._observing and self.observe_until is not None and event.current_index >= self.observe_until:
                self._stop_observing()
        elif event.type_ == EventType.BATCH_END:
            self._widen_global_scales()
            if self._observing:
                self._take_batch()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._observing = False
        for module in self._modules.values():
            with gathered(owner_of(module)):
                _fake(module).freeze(original_weight(module))

    def _take_batch(self) -> None:
        """Fold the extremes of this batch, over all ranks, into the averages of static activations."""
        inputs = [fake.input for module in self._modules.values() if (fake := _fake(module)).input is not None]
        observing = [i for i in inputs if i is not None and i.observing]
        if not observing:
            return
        low, high = (torch.cat([getattr(i, name) for i in observing]) for name in ("batch_low", "batch_high"))
        extremes = SimpleNamespace(reduce={"low": "min", "high": "max"}, low=low, high=high)
        Team.present().reduce_(extremes)
        for i, *batch in zip(observing, extremes.low.split(1), extremes.high.split(1), strict=True):
            i.take_batch(*batch)

    def _stop_observing(self) -> None:
        self._observing = False
        for module in self._modules.values():
            with gathered(owner_of(module)):
                _fake(module).stop_observing(original_weight(module))

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Round the weights to their grids for good, equally on all ranks."""
        with torch.inference_mode(False), torch.no_grad():
            self._widen_global_scales()
            for name, module in self._modules.items():
                stays = is_sharded(owner_of(module))  # shards are held where training had them
                with gathered(owner_of(module)):
                    self._finish(name, module, state, stays)
        join(state.model)
        self._modules, self._norms, self._folded = {}, [], []
        return True

    def _finish(self, name: str, module: nn.Module, state: State, stays: bool) -> None:
        fake = _fake(module)
        if not fake.active:
            restore_dense(module, stays)
            state.ledger.add(name, "qat", flag="never started; left as it was")
        elif fake.input is not None and is_observed(fake.input.args) and not fake.input.batches:
            restore_dense(module, stays)
            state.ledger.add(name, "qat", flag="never saw data; left as it was")
            warnings.warn(
                f"{self.name}: {name} never saw a training batch, so that its static activation scale is "
                f"unknown; left as it was (ignore it, or use dynamic activations)",
                stacklevel=3,
            )
        else:
            W_RC = fake.matrix(original_weight(module)).clone()
            quantized = finish(module, stays)
            Q_RC = as_matrix(module)
            error = weight_error(W_RC, Q_RC)
            state.ledger.add(name, "qat", error=error, **weight_facts(W_RC, Q_RC, quantized, error))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        scales = {}
        for name, module in self._modules.items():
            with gathered(owner_of(module), write=False):
                scales[name] = _fake(module).state()
        phase = {"observing": self._observing, "awaited": sorted(self._awaited), "finished": self.finalized}
        return {**super().state_dict(), **phase, "scales": scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restore(state)

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back, and so are the scales that they were saved with."""
        active = any(_fake(module).active for module in self._modules.values())
        self._restore(state)
        if not active or state["started"]:
            return
        warnings.warn(
            f"{self.name}: the best checkpoint was saved before start={self.start} (unit: {self.unit}), so that its "
            f"weights were not trained for their grids and are rounded to nearest now; set load_best=False, or start "
            f"earlier",
            stacklevel=2,
        )
        self._derive(self._modules)
        for module in self._modules.values():
            _fake(module).active = True

    def _restore(self, state: dict[str, Any]) -> None:
        self._observing, self._awaited = state["observing"], set(state["awaited"])
        for name, module in self._modules.items():
            if name in state["scales"]:
                with gathered(owner_of(module)):
                    _fake(module).load_state(state["scales"][name])
        for module in self._modules.values() if state["finished"] else ():
            _fake(module).active = False  # the weights are final, on their grids


def _fake(module: nn.Module) -> FakeQuantize:
    fake = fake_quantize_of(module)
    assert fake is not None
    return fake


def _global_scale(fake: FakeQuantize) -> Tensor:
    assert fake.global_scale is not None
    return fake.global_scale


def _check_records(records: dict[str, tuple[nn.Module, Quantized]], schemes: dict[str, QuantizationScheme]) -> None:
    """ValueError where the model is quantized already, in another way than the recipe asks for."""
    for name, (_, record) in records.items():
        if name not in schemes:
            raise ValueError(
                f"{name!r} is quantized already ({describe(record.scheme)}), and training would take it off its grid; "
                f"add it to targets, or start from the dense model"
            )
        before, now = record.scheme, schemes[name]
        if _grids(before) != _grids(now):
            raise ValueError(
                f"{name!r} is quantized already as {describe(before)}, and this recipe asks for {describe(now)}; give "
                f"that scheme, or start from the dense model"
            )


def _grids(scheme: QuantizationScheme) -> list[tuple[Any, ...] | None]:
    """The fields of a scheme that define its grids, without those on the search for scales."""
    names = ("num_bits", "type", "symmetric", "dynamic", "group_size", "scale_dtype", "block_structure")
    return [
        p and (QuantizationStrategy(p.strategy), *(getattr(p, name) for name in names))
        for p in (scheme.weights, scheme.input_activations)
    ]
