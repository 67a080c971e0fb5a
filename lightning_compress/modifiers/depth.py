r"""Depth pruning: whole blocks go, those that change their input least.

    influence_l = 1 - mean_n cos(x_l,n, x_l+1,n)          x_l,n: token n where it enters block l

Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. (1); Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, sec. 2.2.

What is left is a model with fewer layers, which config.json states. Of all that structured pruning removes, layers gain
the most speed, and cost the most accuracy.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.distributed import world_size
from lightning_compress.pruning.importance import block_influence
from lightning_compress.structure.blocks import find_layers
from lightning_compress.structure.config import check_states, is_transformers, layer_fields
from lightning_compress.structure.final_shapes import shape_conflict
from lightning_compress.structure.surgery import cut_layers

__all__ = ["DepthPruningModifier"]


class DepthPruningModifier(Modifier):
    """Remove whole blocks: at set-up (``layers``, with ``start=0``), while training, or after it (no window).

    Args:
        layers: Which blocks go, from 0; negative ones count from the end.
        count: Instead how many go: those with the least influence on what passes through them, measured on the training
            batches before ``start``, or on calibration batches where there is no window.
        blocks: Dotted name of the ModuleList or Sequential of blocks; by default the longest one.
        protect: With ``count``, how many blocks at either end stay whatever their influence.

    Raises:
        ValueError: Neither or both of ``layers`` and ``count``, places that do not exist, nothing left, ``count`` at
            set-up, where nothing is measured yet, a list of blocks that cannot be told, a config that cannot state the
            new depth, several processes and a cut that is not at set-up.
    """

    layers: list[int] | None = None
    count: int | None = Field(default=None, ge=1)
    blocks: str | None = None
    protect: int = Field(default=0, ge=0)

    _path: str = PrivateAttr(default="")
    _sums: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(0, dtype=torch.float64))  # of 1 - cos, [L] blocks
    _seen: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # tokens of each, [L]
    _in_batch: bool = PrivateAttr(default=False)
    _cut: bool = PrivateAttr(default=False)
    _before: int = PrivateAttr(default=0)  # parameters

    @model_validator(mode="after")
    def _arguments_fit(self) -> "DepthPruningModifier":
        if (self.layers is None) == (self.count is None):
            both = "neither" if self.layers is None else "both"
            raise ValueError(f"give either layers (which blocks go) or count (how many), got {both}")
        if self.layers is not None and (not self.layers or self.protect):
            raise ValueError(f"layers={self.layers}, protect={self.protect}: name blocks that go; protect is for count")
        if self.count is not None and self.start == 0:
            raise ValueError(
                "count needs batches to measure the influence of blocks on, and start=0 cuts at set-up: give a later "
                "start, leave start out, or name the layers"
            )
        return self

    @property
    def needs(self) -> Needs:
        measured = self.start is None and self.count is not None
        return Needs(data=measured, survey=measured, changes_shapes=True)

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        """Later blocks get new names, so it does not matter which of them ``other`` works on."""
        return shape_conflict(self, other, other.touches(state), earlier)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the list of blocks, and refuse what cannot be done, before any training."""
        model = state.model
        if world_size() > 1 and self.start is not None and self.start != 0:
            raise ValueError(
                f"{self.name}: several processes train this model, whose parameters cannot change once DDP has wrapped "
                f"it: name the layers, with start=0"
            )
        self._path = find_layers(model, self.blocks)
        blocks = self._blocks(model)
        total, gone = len(blocks), len(self._named(len(blocks))) if self.layers is not None else self.count or 0
        if gone + 2 * self.protect > total or gone >= total:
            raise ValueError(
                f"{gone} of {total} blocks in {self._path!r} cannot go, with protect={self.protect}; take fewer"
            )
        self._before = sum(p.numel() for p in model.parameters())
        self._sums, self._seen = torch.zeros(total, dtype=torch.float64), torch.zeros(total, dtype=torch.int64)
        self._check_config(model, total, gone)
        if self.count is not None and self.start is not None:
            self._watch(model)
        return True

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self._path).children())

    def _named(self, total: int) -> list[int]:
        """``layers`` as places from 0."""
        assert self.layers is not None
        if wrong := [place for place in self.layers if not -total <= place < total]:
            raise ValueError(f"layers={self.layers}: {self._path!r} has {total} blocks, so there is no {wrong[0]}")
        places = sorted({place % total for place in self.layers})
        if len(places) < len(self.layers):
            raise ValueError(f"layers={self.layers} names a block twice; {self._path!r} has {total} blocks")
        return places

    def _check_config(self, model: nn.Module, total: int, gone: int) -> None:
        if not is_transformers(model):
            return
        places = self._named(total) if self.layers is not None else list(range(self.protect, self.protect + gone))
        kept = [place for place in range(total) if place not in places]
        prefix, shapes = f"{self._path}.", {}
        for name, parameter in model.named_parameters():
            place, _, rest = name.removeprefix(prefix).partition(".")
            if not name.startswith(prefix):
                shapes[name] = list(parameter.shape)
            elif int(place) in kept:
                shapes[f"{prefix}{kept.index(int(place))}.{rest}"] = list(parameter.shape)
        check_states(model, layer_fields(model.config, total, kept), shapes, "name its list of layers with blocks=...")

    # -- influence ----------------------------------------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        for place, block in enumerate(self._blocks(model)):
            self.hook(block, self._watcher(place), "forward", with_kwargs=True)

    def _watcher(self, place: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.start is not None and not self._in_batch:  # validation
                return
            entered = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            left = output if isinstance(output, Tensor) else output[0]
            total, tokens = block_influence(entered, left, self.token_mask)
            self._sums[place] += total
            self._seen[place] += tokens

        return watch

    def _weakest(self) -> list[int]:
        if not self._seen.all():
            raise ValueError(
                f"{self.name}: block {int((self._seen == 0).nonzero()[0])} of {self._path!r} saw no batch before the "
                f"cut; give a later start, or calibration batches"
            )
        influence = self._sums / self._seen
        inner = influence[self.protect : len(influence) - self.protect]
        return sorted(int(p) + self.protect for p in torch.argsort(inner, stable=True)[: self.count])

    # -- the cut ------------------------------------------------------------------------------------------------------

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ in (EventType.BATCH_START, EventType.BATCH_END):
            self._in_batch = event.type_ == EventType.BATCH_START

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._prune(state)

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.start is None and not self.needs.data:
            self._prune(state)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.needs.data:
            self._watch(state.model)

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if not state.block_name:  # the last one: what lies outside blocks
            self._prune(state)

    def _prune(self, state: State) -> None:
        self.remove_hooks()
        if self._cut:
            return
        model, blocks = state.model, self._blocks(state.model)
        gone = self._named(len(blocks)) if self.layers is not None else self._weakest()
        kept = [place for place in range(len(blocks)) if place not in gone]
        config = layer_fields(model.config, len(blocks), kept) if is_transformers(model) else {}
        optimizers = state.optimizer if isinstance(state.optimizer, list | tuple) else [state.optimizer]
        cut_layers(model, self._path, kept, [o for o in optimizers if o is not None], config=config)
        self._cut = True
        said = f"the model: {self._before} -> {sum(p.numel() for p in model.parameters())} parameters"
        for place in gone:
            weights = sum(p.numel() for p in blocks[place].parameters())
            row = state.ledger.add(f"{self._path}.{place}", "depth", scheme="removed", params=weights)
            row.flags.append(said)
            if self.count is not None:
                row.flags.append(f"influence {float(self._sums[place] / self._seen[place]):.4g}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        own = {"sums": self._sums, "seen": self._seen, "cut": self._cut, "before": self._before}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._sums, self._seen = state["sums"].clone(), state["seen"].clone()
        self._cut, self._before = state["cut"], state["before"]
        if self._cut:
            self.remove_hooks()
