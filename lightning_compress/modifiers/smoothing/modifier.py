"""What modifiers that smooth have in common: targets, pairs, and the handlers of the two that need no search."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, EventType, Modifier, Needs, State
from lightning_compress.layers.matching import Names, select
from lightning_compress.layers.matrix import as_matrix, check_weights_work, inputs_as_rows, is_supported, only_input
from lightning_compress.modifiers.smoothing.finder import PairFinder, no_pairs
from lightning_compress.modifiers.smoothing.fold import fold
from lightning_compress.modifiers.smoothing.mappings import Mapped, parse, unmatched
from lightning_compress.modifiers.smoothing.pair import Pair
from lightning_compress.modifiers.smoothing.statistics import ChannelMax, to_source
from lightning_compress.quant.record import Quantized

__all__ = ["MappingArguments", "SmoothingModifier", "rows_of"]


class MappingArguments(BaseModel):
    """Mixin of modifiers.

    Args:
        mappings: Pairs by hand, in place of those that are found: ``{smooth_layer: ..., balance_layers: [...]}`` or
            ``[balance_layers, smooth_layer]``, names or patterns.
    """

    mappings: list[Any] | None = None

    @model_validator(mode="after")
    def _mappings_are_pairs(self) -> "MappingArguments":
        if self.mapped == []:
            raise ValueError("mappings is empty, so that nothing would be smoothed; leave it out to have pairs found")
        return self

    @cached_property
    def mapped(self) -> list[Mapped] | None:
        """The mappings, read."""
        return None if self.mappings is None else parse(self.mappings)

    def finder(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> PairFinder:
        """What finds the pairs of ``targets``.

        Raises:
            ValueError: A mapping matches nothing, or a target is quantized already; names it.
        """
        for number, part in unmatched(self.mapped or [], dict(model.named_modules())):
            raise ValueError(f"mappings[{number}]: {part!r} matches none of the model's modules")
        for name, module in targets.items():
            if Quantized.of(module) is not None:
                raise ValueError(f"{name!r} is quantized already: put {type(self).__name__} before what quantizes it")
        return PairFinder(model, targets, self.mapped)


class SmoothingModifier(MappingArguments, Modifier, ABC):
    """Moves a scale per channel from activations into weights; subclasses say which (:meth:`scale`).

    Args:
        targets: Class names, dotted names or ``re:`` patterns of the layers whose inputs shall be smooth.
        ignore: The same, for what is left out.
    """

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True, window=False)
    technique: ClassVar[str]

    targets: Names = ["Linear"]
    ignore: Names = []

    _targets: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _finder: PairFinder | None = PrivateAttr(default=None)
    _statistics: dict[str, ChannelMax] = PrivateAttr(default_factory=dict)
    _smoothed: int = PrivateAttr(default=0)
    _checked: bool = PrivateAttr(default=False)  # what trains beside it leaves weights plain

    @abstractmethod
    def scale(self, x_J: Tensor, w_J: Tensor) -> Tensor:
        """s per channel, finite and above 0, from max |x| and max |w| of the channel, float32."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.finder(state.model, self._find(state.model))
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START and not self._checked:
            assert state.model is not None
            found = select(state.model, self.targets, self.ignore)
            if held := [name for name, module in found.items() if "weight" in getattr(module, "parametrizations", ())]:
                raise ValueError(
                    f"{self.name} scales weights after training, and another modifier trains {held[0]!r} on a grid or "
                    f"with a mask until then, which would fit no more: smooth the model first, in a run of its own, or "
                    f"leave either out"
                )
            self._checked = True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._targets = self._find(state.model)
        self._finder = self.finder(state.model, self._targets)
        for name, module in self._targets.items():
            self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        seen = [name for name in state.modules if name in self._statistics]
        if seen and state.replay is not None and self._finder is not None:
            with torch.inference_mode(False), torch.no_grad():
                start = time.perf_counter()
                pairs = self._finder.pairs(state.block_name, state.modules, state.replay)
                found = time.perf_counter() - start
                for pair in pairs:
                    self._smooth(state, pair, found / len(pairs))
        for name in seen:
            del self._statistics[name]

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in self._targets:
            state.ledger.add(name, self.technique, flag="no smoothing pair; left as it was")
        if not self._smoothed:
            warnings.warn(
                f"{no_pairs(self.name, self._targets)}; nothing was changed",
                stacklevel=2,
            )
        self._targets, self._statistics, self._finder, self._smoothed = {}, {}, None, 0
        self.remove_hooks()

    def _find(self, model: nn.Module) -> dict[str, nn.Module]:
        found = select(model, self.targets, self.ignore)
        check_weights_work(found, "smooth", in_place=True)
        odd = [f"{name!r} ({type(module).__name__})" for name, module in found.items() if not is_supported(module)]
        if odd:
            raise ValueError(f"cannot smooth the inputs of {', '.join(odd[:5])}: expected layers with a weight matrix")
        return found

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (x_NC := rows_of(name, module, inputs, self.token_mask)) is not None:
            if name not in self._statistics:
                self._statistics[name] = ChannelMax(x_NC.shape[1], x_NC.device)
            self._statistics[name].update(x_NC)

    def _smooth(self, state: State, pair: Pair, seconds: float) -> None:
        start = time.perf_counter()
        statistics = {name: self._statistics[name] for name in pair.consumers if name in self._statistics}
        fed = [name for name, statistic in statistics.items() if statistic.tokens]
        if not fed:
            return
        J, index = len(pair.channels_J), {name: consumer.index_C for name, consumer in pair.consumers.items()}
        x_J = to_source([(index[name], statistics[name].value()) for name in fed], J, "amax")
        weights = [(index[name], as_matrix(state.modules[name]).abs().amax(0)) for name in fed]
        fold(pair, state.modules, self.scale(x_J, to_source(weights, J, "amax")))
        self._smoothed += 1
        for name in fed:
            del self._targets[name]
            spent = (seconds + time.perf_counter() - start) / len(fed)
            state.ledger.add(name, self.technique, tokens=statistics[name].tokens, seconds=spent)


def rows_of(name: str, module: nn.Module, inputs: tuple[Any, ...], mask: Tensor | None) -> Tensor | None:
    """The tokens of one call that count, [N, C]; None for layers whose input channels do not come last."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return None
    return inputs_as_rows(module, only_input(name, inputs), mask)[0]
