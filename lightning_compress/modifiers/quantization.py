"""Round to nearest: every weight goes to the closest point of its grid (RTN); activations get dynamic or static scales.

    Q = (clamp(round(W / s) + z, qmin, qmax) - z) * s

Weights need no data. Static activation scales do: an observer watches each module's input while batches run. So do
scales that are chosen by what the output of the layer loses:

    imatrix   sum_j H_jj e_j^2,  hessian   e H_gg e^T          H = E[x x^T], e = w - q, per row and group g of columns
"""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.layers.matrix import (
    as_matrix,
    input_layout,
    inputs_as_rows,
    is_embedding,
    only_input,
    partitions,
)
from lightning_compress.layerwise.input_hessian import MomentPool, PerShared, groups_as_partitions
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.observers import InputMoment, Observer, ObserverName, is_observed, make_observer
from lightning_compress.quant.rounding import DEAD_INPUT, round_embeddings, round_module
from lightning_compress.quant.scales import group_columns
from lightning_compress.quant.shared_scales import GlobalScales

__all__ = ["QuantizationModifier"]


class QuantizationModifier(QuantizationArguments, Modifier):
    """Round weights to nearest, and quantize activations where the scheme says so.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset (``W4A16``, ``W8A8``, ``FP8_DYNAMIC`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row; ``auto`` or a list of
            sizes for one that fits each module.
        config_groups: Schemes in full, in place of ``scheme``.
        scale_search: ``minmax``: scales from each group's extremes. ``mse``: clip where that lowers sum |w - q|^2.4.
            ``imatrix``: where it lowers sum_j E[x_j^2] (w_j - q_j)^2; needs data. ``hessian``: where it lowers
            E[((w - q) x)^2] over the columns that share a scale; needs data.
        share_inputs: With ``hessian``, one statistic for modules that receive the very same tensor (query, key, value).
        observer: How static activation scales are found: ``minmax``, ``moving_average``, ``mse``, ``percentile`` or
            ``histogram``.
        averaging_constant: Of ``moving_average``: the weight of the newest batch.
    """

    every_format: ClassVar[bool] = True
    embeddings: ClassVar[Embeddings] = "shared"

    scale_search: Literal["minmax", "mse", "imatrix", "hessian"] = "minmax"
    share_inputs: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)  # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _observers: dict[str, Observer] = PrivateAttr(default_factory=dict)
    _moments: dict[str, InputMoment] = PrivateAttr(default_factory=dict)
    _pool: MomentPool = PrivateAttr(default_factory=MomentPool)
    _forms: PerShared[Tensor] = PrivateAttr(default_factory=PerShared)
    _globals: GlobalScales = PrivateAttr(default_factory=lambda: GlobalScales({}, {}))

    @property
    def needs(self) -> Needs:
        data = self.has_static_inputs or self.scale_search in ("imatrix", "hessian")
        return Needs(calibration=True, data=data, one_pass=True)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.assign(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._schemes = self.assign(state.model)
        self._modules = {name: state.model.get_submodule(name) for name in self._schemes}
        self._globals = GlobalScales(self._modules, self._schemes)
        self._pool = MomentPool(self.share_inputs)
        for name, scheme in self._schemes.items():
            args = scheme.input_activations
            if is_observed(args):
                self._observers[name] = make_observer(self.observer, args, self.averaging_constant)
            module = self._modules[name]
            if self.scale_search == "imatrix" and not is_embedding(module):
                self._moments[name] = InputMoment(partitions(module), as_matrix(module).shape[1])
            by_form = self.scale_search == "hessian" and not is_embedding(module)
            if name in self._observers or name in self._moments or by_form:
                self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = only_input(name, inputs)
        if self.scale_search == "hessian":
            g = self._columns(name)
            layout, mask = (input_layout(module), g), self.token_mask
            self._pool.update(name, x, layout, lambda: groups_as_partitions(inputs_as_rows(module, x, mask), g))
            if name not in self._observers:
                return
        rows = inputs_as_rows(module, x, self.token_mask)
        if name in self._moments:
            self._moments[name].update(rows)
        if name not in self._observers:
            return
        try:
            self._observers[name].update(rows)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error

    def _columns(self, name: str) -> int:
        """g: columns of a module that share a scale."""
        args = self._schemes[name].weights
        assert args is not None
        return group_columns(args, as_matrix(self._modules[name]).shape[1])

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self._pool.drop_stale()
        self._round(state, state.modules)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._round(state, state.modules)
        self._pool.drop(*state.modules)

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
        self._globals, self._pool = GlobalScales({}, {}), MomentPool()
        self._forms.clear()
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
            form, tokens = self._form(state, name)
            if self.scale_search == "hessian" and form is None:
                continue
            self.remove_hooks(self._modules[name])
            importance_PC = None if moment is None else moment.value()
            module, scheme, shared = self._modules[name], self._schemes.pop(name), self._globals.of(name)
            facts = round_module(name, module, scheme, self.scale_search, observer, shared, importance_PC, H_PGgg=form)
            dead = observer is not None and observer.is_dead
            state.ledger.add(name, "rtn", flag=DEAD_INPUT if dead else None, tokens=tokens, **facts)

    def _form(self, state: State, name: str) -> tuple[Tensor | None, int | None]:
        """With ``hessian``, E[x x^T] of each group of columns, [P, G, g, g], and its tokens; None before it saw any."""
        shared = self._pool.get(name) if self.scale_search == "hessian" else None
        if shared is None:
            return None, None
        assert shared.moment is not None
        if shared not in self._forms:
            if state.distributed:
                all_reduce_(shared.moment)
            self._forms[shared] = shared.moment.take()
        return self._forms[shared].unflatten(0, (partitions(self._modules[name]), -1)), shared.moment.tokens

    def _round_unseen(self, state: State) -> None:
        """With imatrix and hessian, weights whose input was never seen: their errors weigh the same in all columns."""
        for name in [name for name in self._schemes if name not in self._observers]:
            scheme, shared = self._schemes.pop(name), self._globals.of(name)
            facts = round_module(name, self._modules[name], scheme, "mse", None, shared)
            state.ledger.add(name, "rtn", flag="never saw data; scales by mse", **facts)
