"""AWQ: scale up the weights of channels with large activations before rounding (Lin et al., 2023, arXiv:2306.00978).

    Q(W s) (X / s)        in place of Q(W) X: the weights that matter most get the finest grid
    s_j = x_j^r / w_j^(1 - r)          x_j = mean |X_j|, w_j = mean over rows of |W_j| / (largest of its group)
    s   = s / sqrt(max(s) min(s)),     r on a grid; the s with the least squared error of the parent's output is folded

The first point of the grid is s = 1, rounding to nearest as it is; a tie keeps it. 1 / s goes into the source, the norm
or the linear layer that makes X; sources are found and checked (smoothing/). The parent is the module around the layers
that one source feeds, the attention or the MLP. A layer alone is its own parent, and there the squared error is exact
without running anything, for all points of the grid at once: with D = Q(W s) / s - W and H = E[x x^T], tr(D H D^T).

Optionally the range of each group of weights is clipped: max|w| * c with the least d H_gg d^T, c = 1, 0.95 ... 0.5.

Shapes: R rows, C input channels, J channels of the source, G groups of g columns, K points of the grid.
"""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.core.precision import plain_precision
from lightning_compress.layers.matrix import as_matrix, check_weights_work, input_layout, only_input, write_matrix
from lightning_compress.layerwise.input_hessian import HessianPool
from lightning_compress.layerwise.parent import ParentCalls, common_parent, keep_calls
from lightning_compress.modifiers.smoothing.finder import PairFinder, no_pairs
from lightning_compress.modifiers.smoothing.fold import fold, spread
from lightning_compress.modifiers.smoothing.modifier import MappingArguments, rows_of
from lightning_compress.modifiers.smoothing.pair import Pair
from lightning_compress.modifiers.smoothing.statistics import ChannelMean, to_source
from lightning_compress.modifiers.smoothing.successive_halving import FIRST_TOKENS, race, rungs, winner
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.rounding import round_module
from lightning_compress.quant.scales import group_columns, minmax

__all__ = ["AWQModifier", "Point", "awq_scale", "clipped", "grid", "group_sizes", "rounded_with"]

CLIPS = tuple(1 - 0.05 * i for i in range(11))
AT_ONCE = 1 << 24  # weights of candidates that are rounded together: 64 MB
MANY_ROWS = 64  # of a layer, from which a quarter of them tells good points from bad ones


@dataclass(frozen=True)
class Point:
    """A point of the grid: r, and whether the weights are asked (duo scaling)."""

    ratio: float
    duo: bool

    @property
    def is_identity(self) -> bool:
        return self.ratio == 0 and not self.duo


def grid(points: int, duo: bool) -> list[Point]:
    """s = 1 first, then ratios that are spread evenly: over [0, 1] with duo scaling, over (0, 1] without."""
    if points == 1:
        return [Point(0.0, False)]
    if duo:
        return [Point(0.0, False), *(Point(i / max(1, points - 2), True) for i in range(points - 1))]
    return [Point(i / (points - 1), False) for i in range(points)]


def awq_scale(x_J: Tensor, w_J: Tensor, point: Point) -> Tensor:
    """s per channel, float32; 1 where the channel is always zero.

    Args:
        x_J: mean |x|.
        w_J: :func:`group_sizes` of what the channel feeds.
        point: r, and whether w counts.
    """
    if point.is_identity:
        return torch.ones_like(x_J)
    s_J = x_J.double().pow(point.ratio)
    if point.duo:
        s_J = s_J / (w_J.double().pow(1 - point.ratio) + 1e-4)
    alive_J = (x_J > 0) & s_J.isfinite() & (s_J > 0)
    if not alive_J.any():
        return torch.ones_like(x_J)
    s_J = s_J.clamp(min=1e-4)
    s_J = s_J / (s_J[alive_J].max() * s_J[alive_J].min()).sqrt()
    return torch.where(alive_J, s_J, 1.0).float()


def group_sizes(W_RC: Tensor, args: QuantizationArgs) -> Tensor:
    """mean over rows of |w| / (largest |w| of its group), [C]: where columns stand within the grids of their groups."""
    size_RC = W_RC.float().abs()
    if args.strategy == "tensor":
        return (size_RC / (size_RC.max() + 1e-6)).mean(0)
    blocks = size_RC.unflatten(1, (-1, group_columns(args, W_RC.shape[1])))
    return (blocks / (blocks.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def rounded_with(W_RC: Tensor, s_C: Tensor, args: QuantizationArgs) -> Tensor:
    """Q(W s) / s: what the layer computes with once s is folded, in the dtype of W."""
    scaled_RC = (W_RC.float() * s_C).to(W_RC.dtype)
    return (round_weight(scaled_RC, *minmax(scaled_RC, args), args).float() / s_C).to(W_RC.dtype)


def layer_errors(W_RC: Tensor, s_KC: Tensor, args: QuantizationArgs, H_CC: Tensor) -> Tensor:
    """tr(D H D^T) of each point, [K]: the squared error of the layer's output, summed over rows, per token."""
    R, C = W_RC.shape
    some = 1 if args.strategy == "tensor" else max(1, AT_ONCE // (R * C))
    errors = []
    for s_kC in s_KC.split(some):
        D_kRC = torch.cat([W_RC.float()] * len(s_kC))
        s_rows = s_kC.repeat_interleave(R, 0)
        scaled = (D_kRC * s_rows).to(W_RC.dtype)
        D_kRC = round_weight(scaled, *minmax(scaled, args), args).float() / s_rows - D_kRC
        errors.append(((D_kRC @ H_CC) * D_kRC).sum(1).view(len(s_kC), R).sum(1, dtype=torch.float64))
    return torch.cat(errors)


def clipped(W_RC: Tensor, args: QuantizationArgs, H_CC: Tensor) -> Tensor:
    """The weight with each group's range cut to where rounding loses least of the output, group by group.

    Args:
        W_RC: The weight.
        args: Its grid, with one scale per group or per row.
        H_CC: E[x x^T] of its inputs; only the blocks on the diagonal count.
    """
    R, C = W_RC.shape
    g = group_columns(args, C)
    H_Ggg = torch.stack([H_CC[i : i + g, i : i + g] for i in range(0, C, g)])
    limit_RG1 = W_RC.float().abs().unflatten(1, (-1, g)).amax(-1, keepdim=True)
    best_RG = torch.full((R, C // g), math.inf, device=W_RC.device, dtype=torch.float32)
    result = W_RC.clone()
    for clip in CLIPS:
        cut_RC = W_RC if clip == 1 else _cut(W_RC, limit_RG1 * clip, g)
        D_GRg = (round_weight(cut_RC, *minmax(cut_RC, args), args) - W_RC).float().unflatten(1, (-1, g)).transpose(0, 1)
        loss_RG = ((D_GRg @ H_Ggg) * D_GRg).sum(-1).t()
        better_RC = (loss_RG < best_RG).repeat_interleave(g, 1)
        result = torch.where(better_RC, cut_RC, result)
        best_RG = torch.minimum(best_RG, loss_RG)
    return result


def _cut(W_RC: Tensor, limit_RG1: Tensor, g: int) -> Tensor:
    return W_RC.float().unflatten(1, (-1, g)).clamp(-limit_RG1, limit_RG1).flatten(1).to(W_RC.dtype)


class AWQModifier(QuantizationArguments, MappingArguments, Modifier):
    """Find the scales of AWQ and fold them; then round to nearest, or leave that to a later modifier.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset (``W4A16``, ``W3A16`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row; ``auto`` or a list of
            sizes for one that fits each module.
        config_groups: Schemes in full, in place of ``scheme``.
        quantize: Round the targets when their scales are folded. False: only scale (and clip) for a later modifier,
            such as GPTQ, which takes the same scheme.
        n_grid: Points of the grid; 1: only s = 1.
        duo_scaling: Ask the weights too.
        loss: ``parent``: of the output of the attention or the MLP around the layers. ``layer``: of the outputs of the
            layers themselves, from second moments: its cost does not grow with the data.
        clip: Cut the range of each group of weights where that loses less of the layer's output.
        scale_search: Of the rounding: ``minmax``, or ``mse``, which clips where that lowers sum |w - q|^2.4.
        mappings: Pairs by hand, in place of those that are found: ``{smooth_layer: ..., balance_layers: [...]}`` or
            ``[balance_layers, smooth_layer]``, names or patterns.

    Raises:
        ValueError: A pair given by hand is not invariant, matches nothing, or feeds layers without a parent.
    """

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True)

    quantize: bool = True
    n_grid: int = Field(default=20, ge=1)
    duo_scaling: bool = True
    loss: Literal["parent", "layer"] = "parent"
    clip: bool = False
    scale_search: Literal["minmax", "mse"] = "minmax"

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)  # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _finder: PairFinder | None = PrivateAttr(default=None)
    _means: dict[str, ChannelMean] = PrivateAttr(default_factory=dict)
    _scaled: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _activations_are_dynamic(self) -> "AWQModifier":
        if self.quantize and self.has_static_inputs:
            raise ValueError(
                "static activations cannot be calibrated before the scales are folded; set quantize=False and put a "
                "QuantizationModifier with this scheme behind"
            )
        return self

    def claims(self, state: State) -> dict[str, str]:
        return super().claims(state) if self.quantize else {}

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        modules = {name: state.model.get_submodule(name) for name in self.assign(state.model)}
        check_weights_work(modules, "smooth", in_place=True)
        self.finder(state.model, modules)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._schemes = self.assign(state.model)
        self._modules = {name: state.model.get_submodule(name) for name in self._schemes}
        self._finder = self.finder(state.model, self._modules)
        for name, module in self._modules.items():
            self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        seen = [name for name in state.modules if name in self._means]
        if seen and state.replay is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._finish(state, seen)
        for name in seen:
            del self._means[name]

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        unseen = list(self._schemes)
        for name in unseen:
            if self.quantize:
                facts = round_module(name, self._modules[name], self._schemes[name], self.scale_search)
                state.ledger.add(name, "awq", flag="never saw data; rounded to nearest", tokens=0, **facts)
            else:
                state.ledger.add(name, "awq", flag="never saw data; left as it was", tokens=0)
        if unseen:
            done = "rounded to nearest" if self.quantize else "left as they were"
            warnings.warn(f"{self.name}: {', '.join(unseen)} never saw data and were {done}", stacklevel=2)
        elif not self._scaled:
            warnings.warn(
                f"{no_pairs(self.name, self._modules)}, so that this is rounding to nearest",
                stacklevel=2,
            )
        self._schemes, self._modules, self._means, self._finder = {}, {}, {}, None
        self._scaled = 0
        self.remove_hooks()

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (x_NC := rows_of(name, module, inputs, self.token_mask)) is not None:
            if name not in self._means:
                self._means[name] = ChannelMean(x_NC.shape[1], x_NC.device)
            self._means[name].update(x_NC)

    # -- one block ----------------------------------------------------------------------------------------------------

    def _finish(self, state: State, seen: Sequence[str]) -> None:
        assert state.replay is not None
        assert self._finder is not None
        start = time.perf_counter()
        pairs = [pair for pair in self._finder.pairs(state.block_name, state.modules, state.replay) if self._fed(pair)]
        parents = {pair.source: self._parent(state, pair) for pair in pairs}
        alone = {name for pair in pairs if parents[pair.source] is None for name in self._fed(pair)}
        calls, moments = self._look_again(state, parents, set(seen) if self.clip else alone)
        scales = [self._search(pair, calls.get(parents[pair.source] or ""), moments) for pair in pairs]
        found: dict[str, Tensor] = {}  # s of each target
        for pair, s_J in zip(pairs, scales, strict=True):  # all were sought on the dense block
            found |= {name: spread(pair.consumers[name].index_C, s_J) for name in self._fed(pair)}
            if not bool((s_J == 1).all()):
                fold(pair, state.modules, s_J)
            self._scaled += 1
        seconds = (time.perf_counter() - start) / len(seen)
        for name in seen:
            self._complete(state, name, found.get(name), moments, seconds)

    def _fed(self, pair: Pair) -> list[str]:
        """The targets of a pair that have seen tokens."""
        return [name for name in pair.consumers if name in self._means and self._means[name].tokens]

    def _parent(self, state: State, pair: Pair) -> str | None:
        """The name of the parent; None where the layers themselves are measured.

        Raises:
            ValueError: A pair given by hand feeds several layers that no module holds.
        """
        fed = self._fed(pair)
        if self.loss == "layer" or len(fed) == 1:
            return None
        parent = common_parent(fed, state.modules)
        if parent is None and self.mapped is not None:
            raise ValueError(
                f"AWQ target without a parent: no module below the model holds all of {fed}, which {pair.source!r} "
                f"feeds, so that there is no output to measure; set loss='layer', or leave this mapping out"
            )
        return parent

    def _look_again(
        self, state: State, parents: Mapping[str, str | None], measured: set[str]
    ) -> tuple[dict[str, ParentCalls], HessianPool]:
        """All batches once more: calls of parents are kept, H of the layers in ``measured`` is added up."""
        pool, replay = HessianPool(), state.replay
        assert replay is not None

        @plain_precision()
        def observe(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = only_input(name, inputs)
            mask = self.token_mask

            def rows() -> Tensor:
                x_NC = rows_of(name, module, inputs, mask)
                assert x_NC is not None
                return x_NC[None]

            pool.update(name, x, input_layout(module), rows)

        handles = [
            self._modules[name].register_forward_pre_hook(lambda m, inputs, n=name: observe(n, m, inputs))
            for name in sorted(measured)
        ]
        wanted = {name: state.modules[name] for name in parents.values() if name is not None}
        try:
            if wanted or measured:
                return keep_calls(wanted, lambda: [replay(i) for i in range(state.batches)], self._mask_now), pool
        finally:
            for handle in handles:
                handle.remove()
        return {}, pool

    def _mask_now(self) -> Tensor | None:
        return self.token_mask

    # -- the search ---------------------------------------------------------------------------------------------------

    def _search(self, pair: Pair, calls: ParentCalls | None, moments: HessianPool) -> Tensor:
        """The best s of a pair, [J]."""
        J, fed = len(pair.channels_J), self._fed(pair)
        index = {name: pair.consumers[name].index_C for name in fed}
        x_J = to_source([(index[name], self._means[name].value()) for name in fed], J, "mean")
        sizes = [(index[name], group_sizes(as_matrix(self._modules[name]), self._grid_of(name))) for name in fed]
        w_J = to_source(sizes, J, "mean")
        scales = [awq_scale(x_J, w_J, point) for point in grid(self.n_grid, self.duo_scaling)]
        if calls is not None:
            errors = self._parent_errors(pair, fed, calls, scales)
        else:
            errors = self._layer_errors(pair, fed, moments, scales)
        if not math.isfinite(errors[0]):
            raise ValueError(
                f"NaN or Inf in what {', '.join(map(repr, fed))} lead to once they are rounded; look at their weights, "
                f"and at the precision the model runs in (float16 overflows at 65504)"
            )
        return scales[winner(errors)]

    def _parent_errors(
        self, pair: Pair, fed: Sequence[str], calls: ParentCalls, scales: Sequence[Tensor]
    ) -> list[float]:
        """The squared error of the parent's output with each s; inf where it was given up."""
        dense = {name: as_matrix(self._modules[name]).clone() for name in fed}
        calls = calls.split(FIRST_TOKENS)
        batches = rungs(calls.tokens())

        def errors(some: Sequence[int], rung: int) -> list[float]:
            found = []
            for k in some:
                for name in fed:
                    s_C = spread(pair.consumers[name].index_C, scales[k])
                    write_matrix(self._modules[name], rounded_with(dense[name], s_C, self._grid_of(name)))
                found.append(calls.squared_error(batches[rung]))
            return found

        try:
            return race(len(scales), errors, len(batches))
        finally:
            for name in fed:
                write_matrix(self._modules[name], dense[name])

    def _layer_errors(
        self, pair: Pair, fed: Sequence[str], moments: HessianPool, scales: Sequence[Tensor]
    ) -> list[float]:
        """The squared error of the layers' own outputs with each s, from second moments; inf where it was given up.

        What comes rung by rung are rows, every fourth one first, where rows have scales of their own and are many.
        """
        matrices = {name: as_matrix(self._modules[name]) for name in fed}
        whole = any(self._grid_of(name).strategy in ("tensor", "block") for name in fed)
        whole |= any(len(W_RC) < MANY_ROWS for W_RC in matrices.values())
        rows = [slice(None)] if whole else [slice(0, None, 4), slice(1, None, 4), slice(2, None, 4), slice(3, None, 4)]
        known = []
        for name in fed:
            shared = moments.get(name)
            assert shared is not None
            assert shared.statistic is not None
            s_KC = torch.stack([spread(pair.consumers[name].index_C, s_J) for s_J in scales])
            H_CC = shared.statistic.value()[0] * shared.statistic.tokens
            known.append((matrices[name], s_KC, self._grid_of(name), H_CC))

        def errors(some: Sequence[int], rung: int) -> list[float]:
            each = [layer_errors(W_RC[rows[rung]], s_KC[list(some)], args, H_CC) for W_RC, s_KC, args, H_CC in known]
            found: list[float] = torch.stack(each).sum(0).tolist()
            return found

        return race(len(scales), errors, len(rows))

    def _grid_of(self, name: str) -> QuantizationArgs:
        weights = self._schemes[name].weights
        assert weights is not None
        return weights

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _complete(self, state: State, name: str, s_C: Tensor | None, moments: HessianPool, seconds: float) -> None:
        """Clip and round one target whose scale is folded."""
        module, tokens = self._modules[name], self._means[name].tokens
        flag = None if s_C is not None else "no smoothing pair" + ("; rounded to nearest" if self.quantize else "")
        if self.clip and (shared := moments.get(name)) is not None and self._grid_of(name).strategy != "tensor":
            assert shared.statistic is not None
            H_CC = shared.statistic.value()[0]
            if s_C is not None:
                H_CC = H_CC / s_C / s_C[:, None]  # of the inputs as they are now
            write_matrix(module, clipped(as_matrix(module), self._grid_of(name), H_CC))
        scheme = self._schemes.pop(name)
        facts: dict[str, Any] = {}
        if self.quantize:
            facts = round_module(name, module, scheme, self.scale_search)
        facts["seconds"] = seconds + facts.get("seconds", 0.0)
        state.ledger.add(name, "awq", flag=flag, tokens=tokens, **facts)
