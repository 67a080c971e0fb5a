"""Round to nearest (RTN): every weight becomes the closest point of its grid; activations get dynamic or static scales.

    Q = (clamp(round(W / s) + z, qmin, qmax) - z) * s

Weights need no data. Static activation scales do: an observer sees the input of each module while batches run. So do
scales that minimize the error of the layer's output:

    imatrix   sum_j H_jj e_j^2,  hessian   e H_gg e^T          H = E[x x^T], e = w - q, per row and group g of columns
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Needs, State
from lightning_compress.layers.matrix import as_matrix, input_layout, is_embedding, partitions
from lightning_compress.layerwise.input_hessian import groups_as_partitions
from lightning_compress.layerwise.per_hessian import PerHessian
from lightning_compress.layerwise.quantizer import LayerwiseQuantizer
from lightning_compress.layerwise.token_weights import GRADIENTS, UNSHARDED, Objective
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.observers import MeanSquare, ObserverName
from lightning_compress.quant.rounding import DEAD_INPUT
from lightning_compress.quant.scales import group_columns

__all__ = ["QuantizationModifier"]


class QuantizationModifier(LayerwiseQuantizer):
    """Round weights to nearest, and quantize activations where the scheme says so.

    ``targets``, ``ignore``, ``scheme``, ``group_size`` and ``config_groups`` are those of
    :class:`~lightning_compress.quant.arguments.QuantizationArguments`, ``observer`` and
    ``averaging_constant`` those of :class:`~lightning_compress.layerwise.quantizer.LayerwiseQuantizer`.

    Args:
        scale_search: ``minmax``: scales from each group's extremes. ``mse``: clip where that lowers sum |w - q|^2.4.
            ``imatrix``: where it lowers sum_j E[x_j^2] (w_j - q_j)^2; needs data. ``hessian``: where it lowers
            E[((w - q) x)^2] over the columns that share a scale; needs data.
        objective: With ``imatrix`` and ``hessian``: whether tokens are weighed by the gradient of a loss, as in
            :class:`~lightning_compress.modifiers.gptq.modifier.GPTQModifier`.
        share_inputs: With ``hessian``, one statistic for modules that receive the same tensor (query, key, value).
    """

    technique: ClassVar[str] = "rtn"
    every_format: ClassVar[bool] = True
    embeddings: ClassVar[Embeddings] = "shared"
    promotable: ClassVar[bool] = True

    scale_search: Literal["minmax", "mse", "imatrix", "hessian"] = "minmax"
    objective: Objective = "layer"
    share_inputs: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)

    _squares: dict[str, MeanSquare] = PrivateAttr(default_factory=dict)
    _blocks: PerHessian[Tensor] = PrivateAttr(default_factory=PerHessian)

    @model_validator(mode="after")
    def _objective_is_used(self) -> "QuantizationModifier":
        if self.objective != "layer" and self.scale_search not in ("imatrix", "hessian"):
            raise ValueError(
                f"objective={self.objective!r} weighs the inputs of layers, which scale_search={self.scale_search!r} "
                f"does not use; set scale_search to hessian or imatrix"
            )
        return self

    @property
    def needs(self) -> Needs:
        gradients = GRADIENTS[self.objective]
        data = self.has_static_inputs or self.scale_search in ("imatrix", "hessian")
        sharded = True if gradients is None else UNSHARDED
        return Needs(
            calibration=True, data=data, one_pass=True, team="sums", sharded=sharded,
            survey=gradients is not None, gradients=gradients,
        )  # fmt: skip

    def set_up(self) -> None:
        super().set_up()
        if self.scale_search == "imatrix":
            layers = {name: module for name, module in self._layers.items() if not is_embedding(module)}
            self._squares = {n: MeanSquare(partitions(m), as_matrix(m).shape[1]) for n, m in layers.items()}

    def watches(self, name: str, module: nn.Module) -> bool:
        by_hessian = self.scale_search == "hessian" and not is_embedding(module)
        return by_hessian or name in self._observers or name in self._squares

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        if self.scale_search == "hessian":  # only the blocks H_gg on the diagonal
            g = group_columns(self.weights_of(name), as_matrix(module).shape[1])
            layout = (input_layout(module), g)
            rows = partial(self.rows, name, module, x)
            self._pool.update(name, x, layout, lambda: groups_as_partitions(rows(), g), self.batch_number)
        if name in self._squares:
            self._squares[name].update(self.rows(name, module, x))
        self.observe_range(name, module, x)

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        """Round the layers among ``names`` that remain and have seen the data that they need, if any."""
        names = list(names)
        self.round_tables(state, names)
        self.reduce_ranges(state, names)
        for name in names:
            if name in self._squares and name in self._layers:
                state.team.reduce_(self._squares[name])
        statistics = self.seen(state, names, everywhere=True) if self.scale_search == "hessian" else {}
        for name in [name for name in names if name in self._layers]:
            observer, square, shared = self._observers.get(name), self._squares.get(name), statistics.get(name)
            waits = (observer is not None and not observer.batches) or (square is not None and not square.tokens)
            if waits or (self.scale_search == "hessian" and shared is None):
                continue
            weights: dict[str, Any] = {} if square is None else {"importance_PC": square.value()}
            if shared is not None:
                if shared not in self._blocks:
                    assert shared.statistic is not None
                    self._blocks[shared] = shared.statistic.take()
                weights = {"H_PGgg": self._blocks[shared].unflatten(0, (partitions(self._layers[name]), -1))}
            flag = DEAD_INPUT if observer is not None and observer.is_dead else None
            self.round(state, name, flag, None if shared is None else shared.tokens, **weights)

    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        for name in [name for name in layers if name not in self._observers]:  # errors weigh the same in all columns
            self.round(state, name, "never saw data; scales by mse", scale_search="mse")
        for name in self._layers:
            state.ledger.add(name, self.technique, flag="never saw data; left as it was")
        if self._layers:
            warnings.warn(
                f"{self.name}: {', '.join(self._layers)} never saw data, so that static activation scales are "
                f"unknown; left as they were (ignore them, or use dynamic activations)",
                stacklevel=2,
            )

    def reset(self) -> None:
        super().reset()
        self._squares = {}
        self._blocks.clear()
