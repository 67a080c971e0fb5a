r"""Depth pruning: remove whole blocks, those that change their input least.

    influence_l = 1 - mean_n cos(x_l,n, x_l+1,n)          x_l,n: token n where it enters block l

Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. (1); Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, sec. 2.2.

The result is a model with fewer layers, as config.json states. Of all structures that can be pruned, layers gain the
most speed and cost the most accuracy.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.pruning.importance import block_influence
from lightning_compress.structure.blocks import find_layers
from lightning_compress.structure.config import check_states, is_transformers, layer_fields
from lightning_compress.structure.final_shapes import shape_conflict
from lightning_compress.structure.groups import moved
from lightning_compress.structure.surgery import cut_layers
from lightning_compress.team import Team

__all__ = ["DepthPruningModifier"]


class DepthPruningModifier(Modifier):
    """Remove whole blocks: at set-up (``layers``, with ``start=0``), while training, or after it (no window).

    Args:
        layers: Indices of the blocks to remove, from 0; negative ones count from the end.
        count: Number of blocks to remove, instead of ``layers``: those with the least influence on their input,
            measured on the training batches before ``start``, or on calibration batches without a window.
        blocks: Dotted name of the ModuleList or Sequential of blocks; by default the longest one.
        protect: Number of blocks at either end that ``count`` never removes.

    Raises:
        ValueError: Neither or both of ``layers`` and ``count``, indices that do not exist, no block would remain,
            ``count`` at set-up, before anything is measured, an ambiguous list of blocks, a config that cannot state
            the new depth, several processes and a cut that is not at set-up.
    """

    layers: list[int] | None = None
    count: int | None = Field(default=None, ge=1)
    blocks: str | None = None
    protect: int = Field(default=0, ge=0)

    _path: str = PrivateAttr(default="")
    reduce: ClassVar[dict[str, str]] = {"_sums": "sum", "_tokens": "sum"}

    _sums: Tensor = PrivateAttr(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu")
    )  # of 1 - cos, [L] blocks
    _tokens: Tensor = PrivateAttr(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu")
    )  # seen by each, [L]
    _in_batch: bool = PrivateAttr(default=False)
    _cut: bool = PrivateAttr(default=False)
    _dense_size: int = PrivateAttr(default=0)  # parameters before the cut

    @model_validator(mode="after")
    def _arguments_fit(self) -> "DepthPruningModifier":
        if (self.layers is None) == (self.count is None):
            both = "neither" if self.layers is None else "both"
            raise ValueError(f"give either layers (which blocks to remove) or count (how many), got {both}")
        if self.layers is not None and (not self.layers or self.protect):
            raise ValueError(f"layers={self.layers}, protect={self.protect}: name blocks; protect is for count")
        if self.count is not None and self.start == 0:
            raise ValueError(
                "count needs batches to measure the influence of blocks on, and start=0 cuts at set-up: give a later "
                "start, leave start out, or name the layers"
            )
        return self

    @property
    def needs(self) -> Needs:
        measured = self.start is None and self.count is not None
        return Needs(data=measured, survey=measured, changes_shapes=True, team="sums" if measured else "weights")

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        """Later blocks get new names, so that all modules of ``other`` count."""
        return shape_conflict(self, other, other.touches(state), earlier)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the list of blocks, and check the arguments against it, before any training."""
        model = state.model
        if not Team.present().alone and self.start is not None and self.start != 0:
            raise ValueError(
                f"{self.name}: several processes train this model, whose parameters cannot change once DDP has wrapped "
                f"it: name the layers, with start=0"
            )
        self._path = find_layers(model, self.blocks)
        blocks = self._blocks(model)
        total, count = len(blocks), len(self._named(len(blocks))) if self.layers is not None else self.count or 0
        if count + 2 * self.protect > total or count >= total:
            raise ValueError(
                f"{count} of {total} blocks in {self._path!r} cannot be removed, with protect={self.protect}; take "
                f"fewer"
            )
        self._dense_size = sum(p.numel() for p in model.parameters())
        self._sums, self._tokens = (
            torch.zeros(total, dtype=torch.float64, device="cpu"),
            torch.zeros(total, dtype=torch.int64, device="cpu"),
        )
        if is_transformers(model):  # any choice of blocks leaves the same shapes
            self._check_config(model, total, self._named(total) or range(self.protect, self.protect + count))
        if self.count is not None and self.start is not None:
            self._watch(model)
        return True

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self._path).children())

    def _named(self, total: int) -> list[int]:
        """``layers`` as indices from 0; none with ``count``."""
        layers = self.layers or []
        if wrong := [index for index in layers if not -total <= index < total]:
            raise ValueError(f"layers={layers}: {self._path!r} has {total} blocks, and not a block {wrong[0]}")
        indices = sorted({index % total for index in layers})
        if len(indices) < len(layers):
            raise ValueError(f"layers={layers} names a block twice; {self._path!r} has {total} blocks")
        return indices

    def _check_config(self, model: nn.Module, total: int, removed: Collection[int]) -> None:
        indices = [index for index in range(total) if index not in removed]
        names = {name: moved(name, self._path, indices) for name, _ in model.named_parameters()}
        shapes = {new: list(model.get_parameter(name).shape) for name, new in names.items() if new is not None}
        fields = layer_fields(model.config, total, indices)
        check_states(model, fields, shapes, "name its list of layers with blocks=...")

    # -- influence ----------------------------------------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        for index, block in enumerate(self._blocks(model)):
            self.hook(block, partial(self._observe, index), "forward", with_kwargs=True)

    def _observe(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.start is not None and not self._in_batch:  # validation
            return
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        y = output if isinstance(output, Tensor) else output[0]
        total, tokens = block_influence(x, y, self.token_mask)
        self._sums[index] += total
        self._tokens[index] += tokens

    def _weakest(self) -> list[int]:
        if not self._tokens.all():
            raise ValueError(
                f"{self.name}: block {int((self._tokens == 0).nonzero()[0])} of {self._path!r} saw no batch before the "
                f"cut; give a later start, or calibration batches"
            )
        influence = self._sums / self._tokens
        inner = influence[self.protect : len(influence) - self.protect]
        return sorted(int(p) + self.protect for p in torch.argsort(inner, stable=True)[: self.count])

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}  # it has acted before the first group

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
        if not state.block_name:  # the last one: modules outside of blocks
            state.team.reduce_(self)
            self._prune(state)

    def _prune(self, state: State) -> None:
        self.remove_hooks()
        if self._cut:
            return
        model, blocks = state.model, self._blocks(state.model)
        removed = self._named(len(blocks)) or self._weakest()
        indices = [index for index in range(len(blocks)) if index not in removed]
        config = layer_fields(model.config, len(blocks), indices) if is_transformers(model) else {}
        cut_layers(model, self._path, indices, state.optimizer, config=config)
        self._cut = True
        sizes = f"the model: {self._dense_size} -> {sum(p.numel() for p in model.parameters())} parameters"
        for index in removed:
            weights = sum(p.numel() for p in blocks[index].parameters())
            row = state.ledger.add(f"{self._path}.{index}", "depth", scheme="removed", params=weights)
            row.flags.append(sizes)
            if self.count is not None:
                row.flags.append(f"influence {float(self._sums[index] / self._tokens[index]):.4g}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        statistics = {"sums": self._sums, "seen": self._tokens}
        return {**super().state_dict(), **statistics, "cut": self._cut, "before": self._dense_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._sums, self._tokens = state["sums"].clone(), state["seen"].clone()
        self._cut, self._dense_size = state["cut"], state["before"]
        if self._cut:
            self.remove_hooks()
