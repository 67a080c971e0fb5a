"""Round to nearest: every weight goes to the closest point of its grid (RTN); activations get dynamic or static scales.

    Q = (clamp(round(W / s) + z, qmin, qmax) - z) * s

Weights need no data. Static activation scales do: an observer watches each module's input while batches run.
"""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, PrivateAttr
from torch import nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.matrix import as_matrix, inputs_as_rows, is_embedding, only_input, partitions
from lightning_compress.quant.observers import InputMoment, Observer, ObserverName, is_observed, make_observer
from lightning_compress.quant.rounding import round_embeddings, round_module
from lightning_compress.quant.shared_scales import GlobalScales

__all__ = ["QuantizationModifier"]


class QuantizationModifier(QuantizationArguments, Modifier):
    """Round weights to nearest, and quantize activations where the scheme says so.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset (``W4A16``, ``W8A8``, ``FP8_DYNAMIC`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row.
        config_groups: Schemes in full, in place of ``scheme``.
        scale_search: ``minmax``: scales from each group's extremes. ``mse``: clip where that lowers sum |w - q|^2.4.
            ``imatrix``: where it lowers sum_j E[x_j^2] (w_j - q_j)^2; needs data.
        observer: How static activation scales are found: ``minmax``, ``moving_average``, ``mse``, ``percentile`` or
            ``histogram``.
        averaging_constant: Of ``moving_average``: the weight of the newest batch.
    """

    needs_calibration: ClassVar[bool] = True
    every_format: ClassVar[bool] = True
    embeddings: ClassVar[Embeddings] = "shared"
    one_pass: ClassVar[bool] = True

    scale_search: Literal["minmax", "mse", "imatrix"] = "minmax"
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)       # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _observers: dict[str, Observer] = PrivateAttr(default_factory=dict)
    _moments: dict[str, InputMoment] = PrivateAttr(default_factory=dict)
    _globals: GlobalScales = PrivateAttr(default_factory=lambda: GlobalScales({}, {}))

    @property
    def needs_data(self) -> bool:
        return self.has_static_inputs or self.scale_search == "imatrix"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.assign(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._schemes = self.assign(state.model)
        self._modules = {name: state.model.get_submodule(name) for name in self._schemes}
        self._globals = GlobalScales(self._modules, self._schemes)
        for name, scheme in self._schemes.items():
            args = scheme.input_activations
            if is_observed(args):
                self._observers[name] = make_observer(self.observer, args, self.averaging_constant)
            module = self._modules[name]
            if self.scale_search == "imatrix" and not is_embedding(module):
                self._moments[name] = InputMoment(partitions(module), as_matrix(module).shape[1])
            if name in self._observers or name in self._moments:
                self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs_as_rows(module, only_input(name, inputs), self.token_mask)
        if name in self._moments:
            self._moments[name].update(rows)
        if name not in self._observers:
            return
        try:
            self._observers[name].update(rows)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self._round(state, state.modules)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._round(state, state.modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._round(state, self._modules)
        self._round_unseen(state)
        for name in self._schemes:
            state.ledger.add(name, "rtn", flag="never saw data; left as it was")
        if self._schemes:
            warnings.warn(
                f"{self.name}: {', '.join(self._schemes)} never saw data, so that static activation scales are "
                f"unknown; left as they were (ignore them, or use dynamic activations)",
                stacklevel=2,
            )
        self._schemes, self._modules, self._observers, self._moments = {}, {}, {}, {}
        self._globals = GlobalScales({}, {})
        self.remove_hooks()

    def _round(self, state: State, modules: Mapping[str, nn.Module]) -> None:
        """Round those of ``modules`` that are left to do and whose activation scales, if static, are known."""
        arguments = (self.scale_search, self._globals)
        for name, facts in round_embeddings(modules, self._modules, self._schemes, *arguments):
            state.ledger.add(name, "rtn", **facts)
        for name in [name for name in modules if name in self._schemes]:
            observer, moment = self._observers.get(name), self._moments.get(name)
            if state.distributed:
                for statistic in (observer, moment):
                    if statistic is not None:
                        all_reduce_(statistic)
            if (observer is not None and not observer.batches) or (moment is not None and not moment.tokens):
                continue
            self.remove_hooks(self._modules[name])
            importance_PC = None if moment is None else moment.value()
            module, scheme, shared = self._modules[name], self._schemes.pop(name), self._globals.of(name)
            facts = round_module(name, module, scheme, self.scale_search, observer, shared, importance_PC)
            state.ledger.add(name, "rtn", **facts)

    def _round_unseen(self, state: State) -> None:
        """With imatrix, weights whose input was never seen: their errors weigh the same in all columns."""
        for name in [name for name in self._schemes if name not in self._observers]:
            scheme, shared = self._schemes.pop(name), self._globals.of(name)
            facts = round_module(name, self._modules[name], scheme, "mse", None, shared)
            state.ledger.add(name, "rtn", flag="never saw data; scales by mse", **facts)
