r"""Quantization-aware training: the model learns with its weights (and activations) on the grid they are exported on.

    forward     y = Q(x) Q(W)^T                 what the exported model computes, bit for bit
    backward    straight through, clipped       "ste": Bengio et al. 2013, arXiv:1308.3432; scales follow the weights
                with a gradient for the scale   "lsq": Esser et al. 2020, arXiv:1902.08153

The optimizer moves the dense weights, and with "lsq" the scales; checkpoints hold the dense weights under their own
names. The equations are in ops/fake_quant/reference.py.
"""

import warnings
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
from lightning_compress.distributed import all_reduce_
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.matrix import as_matrix, check_weights_work
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.batch_norm import fold_all
from lightning_compress.quant.embeddings import Embeddings, check_trainable
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
from lightning_compress.quant.weight_metrics import weight_error, weight_facts

__all__ = ["QATModifier"]


class QATModifier(QuantizationArguments, Modifier):
    """Train through fake-quantization, and leave a quantized model behind.

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
        averaging_constant: Of static activation scales: the weight of the newest batch's extremes.
        freeze_bn_at: When BatchNorm layers go over to their running statistics, in ``unit``; by default never.
        fold_batchnorm: Fold BatchNorm layers into the layers before them at set-up, before there are optimizers; what
            is left of them is a shift, in evaluation mode from then on. For models that are trained already.
        learn_activations: From ``observe_until`` on the optimizer trains static activation scales, as those of ``lsq``.
        start: When fake-quantization begins, in ``unit``; until then the model trains as it is.
        end: From then on no scale moves, learned ones neither; fake-quantization stays on.

    Raises:
        ValueError: An argument has a value that it cannot have; targets cannot be quantized; the model is quantized in
            another way already. The message names the modules.
    """

    needs: ClassVar[Needs] = Needs(checkpoint_state=True, fixed_shapes_from="set-up", parametrizes=True)
    embeddings: ClassVar[Embeddings] = "alone"

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
        if self.learn_activations:
            if not self.has_static_inputs:
                raise ValueError(
                    "learn_activations=True, but no scheme has static activations (dynamic ones follow each input); "
                    "leave it out, or give a scheme such as config_groups with input_activations: {dynamic: false}"
                )
            if self.observe_until is None:
                raise ValueError(
                    "learn_activations=True needs observe_until: until then scales are observed, from then on learned"
                )
        for name, value in (("observe_until", self.observe_until), ("freeze_bn_at", self.freeze_bn_at)):
            if value is not None and value < self.start:
                raise ValueError(f"{name}={value} lies before start={self.start} (unit: {self.unit})")
        return self

    def takes_over(self, earlier: Modifier, modules: set[str], state: State) -> bool:
        """From a quantizer with the same window and the same grids: its result is where training starts.

        Raises:
            ValueError: It has other ones.
        """
        if not isinstance(earlier, QuantizationArguments):
            return False
        if (earlier.start, earlier.unit) != (self.start, self.unit):
            raise ValueError(
                f"{self.name} goes on from {earlier.name}, but start={self.start} (unit: {self.unit}) here and "
                f"start={earlier.start} (unit: {earlier.unit}) there; give both the same"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on_initialize will say it again
            before, now = earlier.assign(state.model), self.assign(state.model)
        for name in sorted(modules & before.keys() & now.keys()):
            if _grids(before[name]) != _grids(now[name]):
                raise ValueError(
                    f"{self.name} goes on from {earlier.name}, which quantizes {name!r} as {describe(before[name])}, "
                    f"while training wants {describe(now[name])}; give both the same scheme"
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
        records = _taken_off(model)
        try:
            schemes = self.assign(model)
            check_weights_work({name: model.get_submodule(name) for name in schemes}, "train", in_place=True)
            _check_records(records, schemes)
            check_trainable({name: model.get_submodule(name) for name in schemes})
        except BaseException:
            for module, taken in records.values():
                taken.attach(module)
            raise
        named = {clean_name(name): module for name, module in model.named_modules()}
        self._modules = {name: named[name] for name in schemes}
        inputs = (self.averaging_constant, self.learn_activations)
        for name, scheme in schemes.items():
            module = self._modules[name]
            record = records[name][1] if name in records else None
            parametrize_weight(module, scheme, self.gradient, self.scale_search, record, *inputs)
        return True

    # -- while training -----------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in self._modules.keys() - self._awaited:
            fake = _fake(self._modules[name])
            if not self.resumed:
                fake.derive(_dense(self._modules[name]))
            fake.active = True

    def make_room(self) -> None:
        """The quantizer from which training goes on gets the modules as they were."""
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
        elif event.type_ == EventType.BATCH_END and self._observing:
            self._take_batch()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._observing = False
        for module in self._modules.values():
            _fake(module).freeze(_dense(module))

    def _take_batch(self) -> None:
        """Fold the extremes of this batch, over all ranks, into the averages of static activations."""
        inputs = [fake.input for module in self._modules.values() if (fake := _fake(module)).input is not None]
        watching = [i for i in inputs if i is not None and i.observing]
        if not watching:
            return
        extremes = _Extremes(torch.cat([i.batch_low for i in watching]), torch.cat([i.batch_high for i in watching]))
        all_reduce_(extremes)
        for i, low, high in zip(watching, extremes.low.split(1), extremes.high.split(1), strict=True):
            i.take_batch(low, high)

    def _stop_observing(self) -> None:
        self._observing = False
        for module in self._modules.values():
            _fake(module).stop_observing(_dense(module))

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Weights onto their grids, for good, on every rank alike."""
        with torch.inference_mode(False), torch.no_grad():
            for name, module in self._modules.items():
                fake = _fake(module)
                if not fake.active:
                    restore_dense(module)
                    state.ledger.add(name, "qat", flag="never started; left as it was")
                elif fake.input is not None and not fake.input.args.dynamic and not fake.input.batches:
                    restore_dense(module)
                    state.ledger.add(name, "qat", flag="never saw data; left as it was")
                    warnings.warn(
                        f"{self.name}: {name} never saw a training batch, so that its static activation scale is "
                        f"unknown; left as it was (ignore it, or use dynamic activations)",
                        stacklevel=2,
                    )
                else:
                    W_RC = _dense_matrix(module).clone()
                    quantized = finish(module)
                    Q_RC = as_matrix(module)
                    error = weight_error(W_RC, Q_RC)
                    state.ledger.add(name, "qat", error=error, **weight_facts(W_RC, Q_RC, quantized, error))
        self._modules, self._norms, self._folded = {}, [], []
        return True

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        scales = {name: _fake(module).state() for name, module in self._modules.items()}
        own = {
            "observing": self._observing,
            "awaited": sorted(self._awaited),
            "finished": self.finalized,
            "scales": scales,
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._take(state)

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back, and so are the scales that they were saved with."""
        active = any(_fake(module).active for module in self._modules.values())
        self._take(state)
        if not active or state["started"]:
            return
        warnings.warn(
            f"{self.name}: the best checkpoint was saved before start={self.start} (unit: {self.unit}), so that its "
            f"weights were not trained for their grids and are rounded to nearest now; set load_best=False, or start "
            f"earlier",
            stacklevel=2,
        )
        for module in self._modules.values():
            _fake(module).derive(_dense(module))
            _fake(module).active = True

    def _take(self, state: dict[str, Any]) -> None:
        self._observing, self._awaited = state["observing"], set(state["awaited"])
        for name in self._modules.keys() & state["scales"].keys():
            _fake(self._modules[name]).load_state(state["scales"][name])
        for module in self._modules.values() if state["finished"] else ():
            _fake(module).active = False  # the weights lie on their grids, for good


class _Extremes:
    """Of one batch: lowest and highest input of each layer, [layers]."""

    reduce = {"low": "min", "high": "max"}

    def __init__(self, low: Tensor, high: Tensor):
        self.low, self.high = low, high


def _fake(module: nn.Module) -> FakeQuantize:
    fake = fake_quantize_of(module)
    assert fake is not None
    return fake


def _dense(module: nn.Module) -> Tensor:
    """The weight that the optimizer moves, without gradient."""
    dense: Tensor = module.get_parameter("parametrizations.weight.original")
    return dense.detach()


def _dense_matrix(module: nn.Module) -> Tensor:
    dense = _dense(module)
    return dense.t() if _fake(module).transposed else dense.flatten(1)


def _taken_off(model: nn.Module) -> dict[str, tuple[nn.Module, Quantized]]:
    """The records of an earlier quantization, taken off their modules."""
    records = {clean_name(name): pair for name, pair in Quantized.find(model).items()}
    for module, _ in records.values():
        Quantized.detach(module)
    return records


def _check_records(records: dict[str, tuple[nn.Module, Quantized]], schemes: dict[str, QuantizationScheme]) -> None:
    """ValueError when the model was quantized in another way than it is to be trained."""
    for name, (_, record) in records.items():
        if name not in schemes:
            raise ValueError(
                f"{name!r} is quantized already ({describe(record.scheme)}), and training would take it off its grid; "
                f"add it to targets, or start from the dense model"
            )
        before, now = record.scheme, schemes[name]
        if _grids(before) != _grids(now):
            raise ValueError(
                f"{name!r} is quantized already as {describe(before)}, and this recipe wants {describe(now)}; give the "
                f"scheme of then, or start from the dense model"
            )


def _grids(scheme: QuantizationScheme) -> list[tuple[Any, ...] | None]:
    """What of a scheme says where values may lie, and not how that was found."""
    return [
        p and (p.num_bits, p.type, p.symmetric, p.dynamic, QuantizationStrategy(p.strategy), p.group_size)
        for p in (scheme.weights, scheme.input_activations)
    ]
