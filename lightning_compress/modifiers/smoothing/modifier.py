"""Base classes of modifiers that move scales from activations into weights, block by block."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, EventType, Needs, State
from lightning_compress.layers.matching import Names, select, without_towers
from lightning_compress.layers.matrix import CONVOLUTIONS, as_matrix, check_weights_work, inputs_as_rows, is_supported
from lightning_compress.layers.sharded import is_sharded
from lightning_compress.layerwise.layer import Layer, Solved
from lightning_compress.layerwise.modifier import LayerwiseModifier
from lightning_compress.modifiers.smoothing.fold import fold
from lightning_compress.modifiers.smoothing.pair import Mapped, Pair, parse, unmatched
from lightning_compress.modifiers.smoothing.pair_finder import PairFinder
from lightning_compress.modifiers.smoothing.statistics import ChannelMax, ChannelStatistic, to_source
from lightning_compress.quant.record import Quantized

__all__ = ["PairModifier", "SmoothingModifier"]


class PairModifier(LayerwiseModifier, ABC):
    """Base class of modifiers that scale pairs of a source and the layers that it feeds: implement ``scale_pairs``.

    A scale belongs to all layers that one source feeds, so a block is solved pair by pair instead of layer by layer.

    Args:
        mappings: Pairs given by hand, used instead of searching for pairs: ``{smooth_layer: ..., balance_layers:
            [...]}`` or ``[balance_layers, smooth_layer]``, names or patterns.

    Raises:
        ValueError: A pair given by hand is not invariant, or matches nothing.
    """

    statistic: ClassVar[type[ChannelStatistic]]
    """Statistic of the input channels of a layer."""

    mappings: list[Any] | None = None

    _finder: PairFinder | None = PrivateAttr(default=None)
    _statistics: dict[str, ChannelStatistic] = PrivateAttr(default_factory=dict)  # of the block that runs
    _pair_count: int = PrivateAttr(default=0)  # pairs whose scale was folded

    @abstractmethod
    def scale_pairs(self, state: State, pairs: Sequence[Pair], names: Sequence[str], start: float) -> None:
        """Fold the scales of a block's pairs.

        Args:
            state: State at the end of the block.
            pairs: Pairs of the block, each with a layer that has seen tokens.
            names: Layers of the block that have seen data.
            start: The time at which the work on the block began, for the ledger.
        """

    @model_validator(mode="after")
    def _mappings_are_pairs(self) -> "PairModifier":
        if self.mapped == []:
            raise ValueError("mappings is empty, so that nothing would be smoothed; leave it out to have pairs found")
        return self

    @cached_property
    def mapped(self) -> list[Mapped] | None:
        """The parsed mappings."""
        return None if self.mappings is None else parse(self.mappings)

    def finder(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> PairFinder:
        """A finder of the pairs that feed ``layers``.

        Raises:
            ValueError: A mapping matches nothing, or a layer is quantized already; names it.
        """
        for number, pattern in unmatched(self.mapped or [], dict(model.named_modules())):
            raise ValueError(f"mappings[{number}]: {pattern!r} matches none of the model's modules")
        for name, module in layers.items():
            if Quantized.of(module) is not None:
                raise ValueError(f"{name!r} is quantized already: put {type(self).__name__} before what quantizes it")
        return PairFinder(model, layers, self.mapped)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self.finder(state.model, self.find_layers(state.model))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        self._finder = self.finder(state.model, dict(self._layers))

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, CONVOLUTIONS):  # their input channels do not come last
            return
        x_NC = inputs_as_rows(module, x, self.token_mask)[0]
        if name not in self._statistics:
            self._statistics[name] = self.statistic(x_NC.shape[1], x_NC.device)
        self._statistics[name].update(x_NC)

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        """Scale the pairs of a block."""
        names = list(names)
        if state.replay is not None and (seen := self._reduced(state, names)):
            start = time.perf_counter()
            with torch.inference_mode(False), torch.no_grad():
                pairs = [pair for pair in self._pairs(state) if self.fed_layers(pair)]
                self.scale_pairs(state, pairs, seen, start)
        for name in names:
            self._statistics.pop(name, None)

    def _reduced(self, state: State, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that have seen data on any rank; their statistics become those of all ranks."""
        columns = {name: self._statistics[name].columns for name in names if name in self._statistics}
        for each in state.team.gather(columns, "statistics of channels"):
            columns |= each
        seen = [name for name in names if name in columns]
        for name in seen:
            if name not in self._statistics:
                device = as_matrix(state.modules[name]).device
                self._statistics[name] = self.statistic(columns[name], device)
            state.team.reduce_(self._statistics[name])
        return seen

    def _pairs(self, state: State) -> list[Pair]:
        """The pairs of a block, which rank 0 finds by running the first batch."""
        assert self._finder is not None
        team, replay, what = state.team, state.replay, f"{self.name}: pairs of {state.block_name!r}"
        assert replay is not None
        if team.rank:
            pairs: list[Pair] | None
            while (pairs := team.gather(None, what)[0]) is None:
                replay(0)
            return pairs
        together = is_sharded(state.model)

        def run(batch: int) -> Any:
            if together:  # a call of a sharded block takes all ranks
                team.gather(None, what)
            return replay(batch)

        pairs = [pair.cpu() for pair in self._finder.pairs(state.block_name, state.modules, run)]
        return pairs if team.alone else team.gather(pairs, what)[0]

    def fed_layers(self, pair: Pair) -> list[str]:
        """The layers of a pair that have seen tokens."""
        return [name for name in pair.consumers if name in self._statistics and self._statistics[name].tokens]

    def fold(self, state: State, pair: Pair, s_J: Tensor) -> None:
        """Divide the source by s, and multiply the layers that it feeds by s."""
        if not bool((s_J == 1).all()):
            fold(pair, state.modules, s_J)
        self._pair_count += 1

    def warn_of_no_pairs(self, consequence: str) -> None:
        """Warn that no pair feeds any of the layers."""
        names = list(self._finder.targets) if self._finder is not None else []
        listed = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"{self.name} found no smoothing pair: no norm or linear layer is the only thing that feeds one of "
            f"{listed}{consequence}",
            stacklevel=3,
        )

    def write(self, layer: Layer, solved: Solved) -> dict[str, Any]:
        raise AssertionError("scales are folded pair by pair")

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {**(super().group_state(modules) or {}), "pairs": self._pair_count}

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        super().load_group_state(modules, state)
        self._pair_count = state["pairs"]

    def reset(self) -> None:
        super().reset()
        self._finder, self._statistics, self._pair_count = None, {}, 0


class SmoothingModifier(PairModifier, ABC):
    """Base class of modifiers whose scale is a formula: implement ``scale``.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of the layers whose inputs become smooth.
        ignore: Class names, dotted names or ``re:`` patterns of layers that are left out.
    """

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True, window=False, sharded=True, team="sums")
    statistic: ClassVar[type[ChannelStatistic]] = ChannelMax

    targets: Names = ["Linear"]
    ignore: Names = []

    _checked: bool = PrivateAttr(default=False)  # no modifier trains the layers on a grid or with a mask

    @abstractmethod
    def scale(self, x_J: Tensor, w_J: Tensor) -> Tensor:
        """s of each channel, finite and above 0, float32.

        Args:
            x_J: max |x| of each channel.
            w_J: max |w| of each channel.
        """

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = without_towers(model, select(model, self.targets, self.ignore), self.targets)
        check_weights_work(layers, "smooth", in_place=True)
        odd = [f"{name!r} ({type(module).__name__})" for name, module in layers.items() if not is_supported(module)]
        if odd:
            raise ValueError(f"cannot smooth the inputs of {', '.join(odd[:5])}: expected layers with a weight matrix")
        return layers

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ != EventType.BATCH_START or self._checked:
            return
        for name, module in select(state.model, self.targets, self.ignore).items():
            if "weight" in getattr(module, "parametrizations", ()):
                raise ValueError(
                    f"{self.name} scales weights after training, and another modifier trains {name!r} on a grid or "
                    f"with a mask until then, which would no longer fit: smooth the model first, in a run of its own, "
                    f"or leave either out"
                )
        self._checked = True

    def scale_pairs(self, state: State, pairs: Sequence[Pair], names: Sequence[str], start: float) -> None:
        shared = (time.perf_counter() - start) / max(1, len(pairs))
        for pair in pairs:
            start = time.perf_counter()
            fed, J = self.fed_layers(pair), len(pair.channels_J)
            index = {name: pair.consumers[name].index_C for name in fed}
            x_J = to_source([(index[name], self._statistics[name].value()) for name in fed], J, "amax")
            weights = [(index[name], as_matrix(state.modules[name]).abs().amax(0)) for name in fed]
            self.fold(state, pair, self.scale(x_J, to_source(weights, J, "amax")))
            for name in fed:
                self.finish(name)
                seconds = (shared + time.perf_counter() - start) / len(fed)
                state.ledger.add(name, self.technique, tokens=self._statistics[name].tokens, seconds=seconds)

    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        for name in layers:
            state.ledger.add(name, self.technique, flag="no smoothing pair; left as it was")
        if not self._pair_count:
            self.warn_of_no_pairs("; nothing was changed")
