"""AWQ: scale up the weights of channels with large activations before rounding (Lin et al., 2023, arXiv:2306.00978).

    Q(W s) (X / s)        instead of Q(W) X: the weights that matter most get the finest grid
    s_j = x_j^r / w_j^(1 - r),  r on a grid                                                  (awq_scales.py)
    the s with the least squared error of the parent's output is folded; a tie keeps s = 1, rounding as it is

1 / s goes into the source, the norm or the linear layer that makes X (pair_finder.py). The parent is the module around
the layers that one source feeds, the attention or the MLP. A layer alone is its own parent, and there the squared error
is exact without running anything, for all points of the grid at once.

Optionally the range of each group of weights is clipped (awq_scales.py).

Shapes: R rows, C input channels, J channels of the source, K points of the grid.
"""

import math
import time
import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Needs, State
from lightning_compress.core.precision import plain_precision
from lightning_compress.layers.matrix import as_matrix, check_weights_work, only_input, write_matrix
from lightning_compress.layerwise.input_hessian import InputHessian
from lightning_compress.layerwise.modifier import LayerwiseModifier
from lightning_compress.layerwise.parent import ParentCalls, Place, common_parent, modules_around, record_calls
from lightning_compress.layerwise.quantizer import LayerwiseQuantizer
from lightning_compress.layerwise.token_weights import GRADIENTS, UNSHARDED, Objective
from lightning_compress.modifiers.smoothing.awq_scales import (
    awq_scale,
    clipped,
    grid,
    group_sizes,
    layer_errors,
    rounded_with,
)
from lightning_compress.modifiers.smoothing.fold import spread
from lightning_compress.modifiers.smoothing.modifier import PairModifier
from lightning_compress.modifiers.smoothing.pair import Pair
from lightning_compress.modifiers.smoothing.statistics import ChannelMean, ChannelStatistic, to_source
from lightning_compress.modifiers.smoothing.successive_halving import FIRST_TOKENS, race, rungs, winner
from lightning_compress.quant.rounding import round_module
from lightning_compress.team import Team

__all__ = ["AWQModifier"]

MANY_ROWS = 64  # of a layer, from which a quarter of them tells good points from bad ones


class AWQModifier(LayerwiseQuantizer, PairModifier):
    """Find the scales of AWQ and fold them; then round to nearest, or leave that to a later modifier.

    The layers of a pair share a scale and its error is that of their parent, so no layer is solved alone.

    ``targets``, ``ignore``, ``scheme``, ``group_size`` and ``config_groups`` are those of
    :class:`~lightning_compress.quant.arguments.QuantizationArguments`, ``mappings`` that of
    :class:`~lightning_compress.modifiers.smoothing.modifier.PairModifier`.

    Args:
        quantize: Round the targets when their scales are folded. False: only scale (and clip) for a later modifier,
            such as GPTQ, which takes the same scheme.
        n_grid: Points of the grid; 1: only s = 1.
        duo_scaling: Let the scale depend on the weights too.
        loss: ``parent``: of the output of the attention or the MLP around the layers. ``layer``: of the outputs of the
            layers themselves, from second moments: its cost does not grow with the data.
        objective: ``layer``, ``loss``, ``output`` or ``training_step``: whether tokens are weighed by the gradient of a
            loss in these errors, as in :class:`~lightning_compress.modifiers.gptq.modifier.GPTQModifier`.
        clip: Cut the range of each group of weights where that loses less of the layer's output.
        scale_search: Scales of the rounding: ``minmax``, or ``mse``, which clips where that lowers sum |w - q|^2.4.

    Raises:
        ValueError: A pair given by hand is not invariant, matches nothing, or feeds layers without a parent.
    """

    technique: ClassVar[str] = "awq"
    promotable: ClassVar[bool] = True
    statistic: ClassVar[type[ChannelStatistic]] = ChannelMean

    quantize: bool = True
    n_grid: int = Field(default=20, ge=1)
    duo_scaling: bool = True
    loss: Literal["parent", "layer"] = "parent"
    objective: Objective = "layer"
    clip: bool = False
    scale_search: Literal["minmax", "mse"] = "minmax"

    @model_validator(mode="after")
    def _activations_are_dynamic(self) -> "AWQModifier":
        if self.quantize and self.has_static_inputs:
            raise ValueError(
                "static activations cannot be calibrated before the scales are folded; set quantize=False and put a "
                "QuantizationModifier with this scheme behind"
            )
        return self

    @property
    def needs(self) -> Needs:
        gradients = GRADIENTS[self.objective]
        return Needs(
            data=True, own_pass=True, team="sums", sharded=True if gradients is None else UNSHARDED,
            survey=gradients is not None, gradients=gradients,
        )  # fmt: skip

    def claims(self, state: State) -> dict[str, str]:
        return super().claims(state) if self.quantize else {}

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = super().find_layers(model)
        check_weights_work(layers, "smooth", in_place=True)
        return layers

    def weighed_parents(self, model: nn.Module) -> dict[str, nn.Module]:
        return modules_around(list(self._layers), model) if self.loss == "parent" else {}

    def set_up(self) -> None:
        """Without observers: a later modifier calibrates static activations, on the inputs that folding leaves."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._layers and not self._pair_count:
            self.warn_of_no_pairs(", so that this is rounding to nearest")
        super().on_calibration_end(state, event, **kwargs)

    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        consequence = "rounded to nearest" if self.quantize else "left as they were"
        for name in layers:
            if self.quantize:
                self.round(state, name, "never saw data; rounded to nearest", 0)
            else:
                state.ledger.add(name, self.technique, flag="never saw data; left as it was", tokens=0)
        warnings.warn(f"{self.name}: {', '.join(layers)} never saw data and were {consequence}", stacklevel=2)

    # -- one block ----------------------------------------------------------------------------------------------------

    def scale_pairs(self, state: State, pairs: Sequence[Pair], names: Sequence[str], start: float) -> None:
        parents = {pair.source: self._parent(state, pair) for pair in pairs}
        alone = {name for pair in pairs if parents[pair.source] is None for name in self.fed_layers(pair)}
        measured = sorted(names if self.clip else alone)
        calls = self._replay(state, parents, measured)
        hessians = self._hessians(state, measured)
        searched = [
            (pair, self._search(state, pair, calls.get(parents[pair.source] or ""), hessians)) for pair in pairs
        ]
        scales: dict[str, Tensor] = {}  # s [C] of each layer
        for pair, s_J in searched:  # all searches look at the dense block
            scales |= {name: spread(pair.consumers[name].index_C, s_J) for name in self.fed_layers(pair)}
            self.fold(state, pair, s_J)
        seconds = (time.perf_counter() - start) / len(names)
        for name in names:
            self._complete(state, name, scales.get(name), hessians.get(name), seconds)

    def _parent(self, state: State, pair: Pair) -> str | None:
        """The name of the parent; None where the layers themselves are measured.

        Raises:
            ValueError: A pair given by hand feeds several layers that no module holds.
        """
        fed = self.fed_layers(pair)
        if self.loss == "layer" or len(fed) == 1:
            return None
        parent = common_parent(fed, state.modules)
        if parent is None and self.mapped is not None:
            raise ValueError(
                f"AWQ target without a parent: no module below the model holds all of {fed}, which {pair.source!r} "
                f"feeds, so that there is no output to measure; set loss='layer', or leave this mapping out"
            )
        return parent

    def _replay(
        self, state: State, parents: Mapping[str, str | None], measured: Sequence[str]
    ) -> dict[str, ParentCalls]:
        """Run all batches again: calls of those parents that any rank calls, H of ``measured`` layers into the pool."""
        modules, replay = {name: state.modules[name] for name in parents.values() if name is not None}, state.replay
        if not modules and not measured:
            return {}
        assert replay is not None

        @plain_precision()
        def observe(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            LayerwiseModifier.observe(self, name, module, only_input(name, inputs))

        handles = [
            self._layers[name].register_forward_pre_hook(lambda m, inputs, n=name: observe(n, m, inputs))
            for name in measured
        ]
        try:
            calls = record_calls(
                modules,
                lambda: [replay(i) for i in range(state.batches)],
                lambda: self.token_mask,
                lambda: self.batch_number,
            )
        finally:
            for handle in handles:
                handle.remove()
        for name, each in calls.items() if self._token_weights is not None else ():
            each.weights = self._weights_of_calls(name, each)
        ranks = state.team.gather([name for name in calls if calls[name].outputs], f"{self.name}: calls of parents")
        return {name: each for name, each in calls.items() if any(name in called for called in ranks)}

    def _weights_of_calls(self, parent: str, calls: ParentCalls) -> dict[int, Tensor]:
        """The weights of tokens in the output of a parent, by call."""
        assert self._token_weights is not None
        triples = enumerate(zip(calls.outputs, calls.masks, calls.batches, strict=True))
        weights = {i: self._token_weights.of_output(parent, *call) for i, call in triples}
        return {i: weight for i, weight in weights.items() if weight is not None}

    def _hessians(self, state: State, names: Sequence[str]) -> dict[str, InputHessian]:
        """H of the inputs of these layers, on every rank that of all."""
        hessians = {}
        for name, shared in self.seen(state, names, everywhere=True).items():
            assert shared.statistic is not None
            hessians[name] = shared.statistic
        return hessians

    # -- the search ---------------------------------------------------------------------------------------------------

    def _search(
        self, state: State, pair: Pair, calls: ParentCalls | None, hessians: Mapping[str, InputHessian]
    ) -> Tensor:
        """The best s of a pair, [J]."""
        J, fed = len(pair.channels_J), self.fed_layers(pair)
        index = {name: pair.consumers[name].index_C for name in fed}
        x_J = to_source([(index[name], self._statistics[name].value()) for name in fed], J, "mean")
        sizes = [(index[name], group_sizes(as_matrix(self._layers[name]), self.weights_of(name))) for name in fed]
        w_J = to_source(sizes, J, "mean")
        scales = [awq_scale(x_J, w_J, point) for point in grid(self.n_grid, self.duo_scaling)]
        s_KC = {name: torch.stack([spread(index[name], s_J) for s_J in scales]) for name in fed}
        if calls is None:
            errors = self._layer_errors(s_KC, hessians)
        else:
            errors = self._parent_errors(s_KC, calls, state.team)
        if not math.isfinite(errors[0]):
            raise ValueError(
                f"NaN or Inf in what {', '.join(map(repr, fed))} lead to once they are rounded; look at their weights, "
                f"and at the precision the model runs in (float16 overflows at 65504)"
            )
        return scales[winner(errors)]

    def _parent_errors(self, s_KC: Mapping[str, Tensor], calls: ParentCalls, team: Team) -> list[float]:
        """The squared error of the parent's output with each s; inf where the race left it.

        A rung is some of the pieces of all ranks. Each rank measures its own of them, one by one, and the errors of all
        are added exactly.
        """
        dense = {name: as_matrix(self._layers[name]).clone() for name in s_KC}
        calls = calls.split(FIRST_TOKENS, team)
        tokens = ChainMap(*team.gather(dict(zip(calls.places(), calls.tokens(), strict=True)), "tokens of calls"))
        places = sorted(tokens)
        batches = [{places[i] for i in rung} for rung in rungs([tokens[place] for place in places])]

        def measure(k: int, rung: set[Place]) -> dict[Place, float]:
            if rung.isdisjoint(calls.places()):
                return {}
            for name, W_RC in dense.items():
                write_matrix(self._layers[name], rounded_with(W_RC, s_KC[name][k], self.weights_of(name)))
            return calls.squared_errors(rung)

        def errors(points: Sequence[int], rung: int) -> list[float]:
            ranks = team.gather([measure(k, batches[rung]) for k in points], f"{self.name}: {', '.join(s_KC)}")
            return [math.fsum(error for part in parts for error in part.values()) for parts in zip(*ranks, strict=True)]

        try:
            return race(self.n_grid, errors, len(batches))
        finally:
            for name, W_RC in dense.items():
                write_matrix(self._layers[name], W_RC)

    def _layer_errors(self, s_KC: Mapping[str, Tensor], statistics: Mapping[str, InputHessian]) -> list[float]:
        """The squared error of the layers' own outputs with each s, from second moments; inf where the race left it.

        A rung is a quarter of the rows, every fourth one, where rows have scales of their own and are many.
        """
        matrices = {name: as_matrix(self._layers[name]) for name in s_KC}
        by_rows = all(self.weights_of(name).strategy not in ("tensor", "block") for name in s_KC)
        by_rows &= all(len(W_RC) >= MANY_ROWS for W_RC in matrices.values())
        rows = [slice(i, None, 4) for i in range(4)] if by_rows else [slice(None)]
        hessians = {name: statistics[name].value()[0] * statistics[name].tokens for name in s_KC}

        def errors(points: Sequence[int], rung: int) -> list[float]:
            some = {name: torch.stack([s_KC[name][k] for k in points]) for name in matrices}
            each = [
                layer_errors(W_RC[rows[rung]], some[name], self.weights_of(name), hessians[name])
                for name, W_RC in matrices.items()
            ]
            totals: list[float] = torch.stack(each).sum(0).tolist()
            return totals

        return race(self.n_grid, errors, len(rows))

    def _complete(
        self, state: State, name: str, s_C: Tensor | None, hessian: InputHessian | None, seconds: float
    ) -> None:
        """Clip and round one layer whose scale is folded."""
        tokens, args, scheme = self._statistics[name].tokens, self.weights_of(name), self._schemes[name]
        module = self.finish(name)
        flag = None if s_C is not None else "no smoothing pair" + ("; rounded to nearest" if self.quantize else "")
        if self.clip and hessian is not None and args.strategy != "tensor":
            H_CC = hessian.value()[0]
            if s_C is not None:
                H_CC = H_CC / s_C / s_C[:, None]  # of the inputs as they are now
            write_matrix(module, clipped(as_matrix(module), args, H_CC))
        facts = round_module(name, module, scheme, self.scale_search) if self.quantize else {}
        facts["seconds"] = seconds + facts.get("seconds", 0.0)
        state.ledger.add(name, self.technique, flag=flag, tokens=tokens, **facts)
