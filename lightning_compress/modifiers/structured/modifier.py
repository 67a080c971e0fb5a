r"""Structured pruning: channels, neurons of MLPs and attention heads are removed, so the model is smaller and faster.

    score_u          importance of unit u over all tensors with weights of it          pruning/importance.py
    keep             the n - floor(ratio n) strongest units of each group, rounded up to a multiple of round_to

Muralidharan et al. 2024 (Minitron), arXiv:2407.14679 (MLPs and heads by activations); Molchanov et al. 2019,
arXiv:1906.10771 (Taylor); Fang et al. 2023, arXiv:2301.12900 (channels through residuals and norms, torch-pruning).

Parameters are replaced by smaller ones. The optimizer's groups get those, and its state is cut in the same way. The
cuts are part of every checkpoint, and the new sizes of config.json where the model has one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.precision import model_precision
from lightning_compress.core.state import State
from lightning_compress.layers.matching import listed
from lightning_compress.modifiers.structured.arguments import UNITS, StructuredArguments
from lightning_compress.modifiers.structured.graph import CONVS, check_installed, find_channels, output_size
from lightning_compress.modifiers.structured.trial import check_cut
from lightning_compress.modifiers.structured.unit_statistics import UnitStatistics
from lightning_compress.pruning.importance import input_energy, strongest
from lightning_compress.structure.blocks import head_counts
from lightning_compress.structure.config import check_states, head_fields, is_transformers, mlp_fields
from lightning_compress.structure.final_shapes import shape_conflict
from lightning_compress.structure.groups import (
    Group,
    cut_of,
    group_from_state,
    group_state,
    renumbered,
    units_to_keep,
    without_layers,
)
from lightning_compress.structure.surgery import cut_tensors, record_of, tensors_of
from lightning_compress.team import Team

__all__ = ["StructuredPruningModifier"]


class StructuredPruningModifier(StructuredArguments):
    """Remove the least important units: at set-up (``start=0``), while training, or after it (no window).

    Args:
        dimension: ``mlp``: neurons of the MLPs of transformer blocks. ``heads``: their attention heads, key/value heads
            with all queries that share them. ``channels``: outputs of Linears and convolutions in any network, with
            all layers that depend on them (needs the package torch-pruning). ``auto``: ``mlp`` where there are MLPs of
            transformer blocks, else ``channels``.
        targets: For ``channels`` the layers whose outputs are pruned, by default Linears and convolutions; for the
            others the MLPs or attentions, by default all.
        ignore: Modules to leave out of ``targets``.
        ratio: Share of the units of each group to remove, in [0, 1).
        importance: ``magnitude``; ``taylor`` (gradients of the batches before the cut); ``activation`` (inputs in these
            batches, or the calibration batches without a window).
        schedule: Curve of the share from ``start`` to ``end``; without ``end`` all units are removed at ``start``.
        power: Exponent of ``polynomial``.
        round_to: Numbers of units stay multiples of this, for the hardware and for groups of a later quantization.
        input_shape: Shape of one sample (floats), to trace ``channels`` at set-up; by default they are traced in the
            first forward pass.

    Raises:
        ValueError: A ratio outside of [0, 1), one that removes no unit or all or cuts through groups of query heads,
            targets that match nothing, layers that cannot be cut, a config that cannot state the new sizes, several
            processes and a cut that is not at set-up.
        ImportError: ``channels`` without torch-pruning.
    """

    _groups: dict[str, Group] = PrivateAttr(default_factory=dict)
    _statistics: UnitStatistics = PrivateAttr(default_factory=UnitStatistics)
    _in_batch: bool = PrivateAttr(default=False)
    _late: bool = PrivateAttr(default=False)  # started before the channels were known
    _steps: int = PrivateAttr(default=0)  # cuts in the model that the groups reflect
    _before: int = PrivateAttr(default=0)  # parameters of the dense model

    @property
    def needs(self) -> Needs:
        followed = self._kind not in ("auto", "channels") or self.input_shape is not None
        measured = self.start is None and (self.importance == "activation" or not followed)
        team: Literal["sums", "weights", "alone"] = "weights"
        if measured:
            team = "sums" if followed else "alone"  # a rank without batches cannot follow channels
        return Needs(data=measured, survey=measured, changes_shapes=True, team=team)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the groups, and check the arguments against them, before any training."""
        model = state.model
        self.settle(model)
        self._before, self._steps = sum(p.numel() for p in model.parameters()), len(record_of(model))
        known = self._kind != "channels" or self.input_shape is not None
        if not Team.present().alone and self.start is not None and not (self.start == 0 and self.end is None and known):
            raise ValueError(
                f"{self.name}: several processes train this model, whose shapes cannot change once DDP has wrapped it: "
                f"prune at set-up with start=0 and no end (and input_shape for channels)"
            )
        if self._kind == "channels":
            check_installed()
            if is_transformers(model):
                raise ValueError(
                    f"dimension='channels' does not follow a {type(model).__name__} of transformers: use 'mlp', "
                    f"'heads', or DepthPruningModifier"
                )
            sizes = {name: output_size(module) for name, module in self.channel_targets(model).items()}
            self.check_size(*max(sizes.items(), key=lambda pair: pair[1]))  # small ones may make the output
            if self.input_shape is not None:
                parameter = next(model.parameters())
                sample = torch.zeros(2, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
                self._follow_channels(state, (sample,), {})
        else:
            self._set_groups(self.block_groups(model))
            self._check_config(model)
        if self.start is not None:
            self._observe(state)
        return True

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        self.settle(state.model)
        if self._kind == "channels" or other.needs.fixed_shapes_from == "never":
            return shape_conflict(self, other, other.touches(state), earlier)
        tensors = {piece.tensor for group in self.block_groups(state.model) for piece in group.slices}
        shared = other.touches(state) & {name.rpartition(".")[0] for name in tensors}
        return shape_conflict(self, other, shared, earlier)

    def _set_groups(self, groups: list[Group]) -> None:
        for group in groups:
            self.check_size(group.name, group.units)
        self._groups = {group.name: group for group in groups}

    def _check_config(self, model: nn.Module) -> None:
        """The config of a transformers model must be able to state all final sizes."""
        if not is_transformers(model):
            return
        units = [
            (g, torch.arange(units_to_keep(g.dense, self.ratio, self.round_to), device="cpu"))
            for g in self._groups.values()
        ]
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        for name, along in cut_of(units, {n: t.shape for n, t in tensors_of(model).items()}).items():
            for dim, index in along.items():
                shapes[name][dim] = len(index)
        advice = "prune all blocks alike (no targets, no ignore), or another dimension"
        check_states(model, self._config(model, units), shapes, advice)

    def _follow_channels(self, state: State, args: Any, kwargs: Any) -> None:
        targets = self.channel_targets(state.model)
        with model_precision():
            groups, outputs = find_channels(state.model, targets, args, kwargs)
        if named := [name for name in outputs if name in listed(self.targets or [])]:
            raise ValueError(f"target {named[0]!r} makes the output of the model, whose size is fixed; leave it out")
        for name in outputs:
            state.ledger.add(name, "structured", flag="left whole: it makes the output of the model")
        if not groups:
            raise ValueError(f"every target makes the output of the model ({', '.join(outputs)}): nothing to prune")
        self._set_groups(groups)
        counts = [units_to_keep(group.dense, self.ratio, self.round_to) for group in groups]
        check_cut(state.model, groups, counts, args, kwargs)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _observe(self, state: State) -> None:
        """Hooks that trace channels and observe activations; gradients come with OPTIM_PRE_STEP."""
        if self._kind == "channels" and not self._groups:
            self.hook(state.model, partial(self._first_forward, state), with_kwargs=True)
        else:
            self._watch(state.model)

    def _first_forward(self, state: State, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._groups:
            with self.paused():
                self._follow_channels(state, args, kwargs)
        if set(self.hooked) == {module}:  # a run that is resumed has groups already
            self._watch(module)

    def _watch(self, model: nn.Module) -> None:
        if self.importance != "activation":
            return
        for name, group in self._groups.items():
            for i, piece in enumerate(group.slices):
                if piece.consumer:
                    reader = model.get_submodule(piece.tensor.rpartition(".")[0])
                    self.hook(reader, partial(self._add_energy, name, i))

    def _add_energy(self, name: str, i: int, module: nn.Module, args: Any) -> None:
        if self.start is not None and not self._in_batch:  # validation
            return
        channel_dim = 1 if isinstance(module, CONVS) else -1
        energy, tokens = input_energy(args[0], channel_dim, self._groups[name].slices[i].index, self.token_mask)
        self._statistics.add(name, energy, tokens)

    @property
    def _done(self) -> bool:
        """True when all groups have their final size."""
        return all(g.units == units_to_keep(g.dense, self.ratio, self.round_to) for g in self._groups.values())

    def _follow_layers(self, model: nn.Module) -> None:
        """Where another modifier removed layers, drop groups in them and rename later ones."""
        steps = record_of(model)
        for path, layers in (pair for step in steps[self._steps :] for pair in step.get("layers", {}).items()):
            groups = [without_layers(group, path, layers) for group in self._groups.values()]
            self._groups = {group.name: group for group in groups if group is not None}
            self._statistics.rename(path, layers)
            if self.hooked:
                self.remove_hooks()
                self._watch(model)
        self._steps = len(steps)

    # -- while training -----------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.resumed:  # else the shapes are back already
            self._advance(state, event)

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            self._advance(state, event)

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._advance(state, event)

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ in (EventType.BATCH_START, EventType.BATCH_END):
            self._in_batch = event.type_ == EventType.BATCH_START
            self._follow_layers(state.model)
        if event.type_ == EventType.OPTIM_PRE_STEP and self.importance == "taylor" and self.start is not None:
            self._follow_layers(state.model)
            if not self._done:
                self._statistics.add_gradients(state.model, self._groups)
        elif event.type_ == EventType.BATCH_END and self._late and self._groups:
            self._advance(state, event)

    def _advance(self, state: State, event: Event) -> None:
        self._late = not self._groups
        if self._groups:
            self._prune(state, self.ratio_at(event.current_index))

    # -- after training -----------------------------------------------------------------------------------------------

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.start is None and not self.needs.data:
            self._prune(state, self.ratio)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.needs.data:
            self._observe(state)

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if not state.block_name:  # the last one: modules outside of blocks
            self.remove_hooks()
            if self.importance == "activation":
                self._statistics.reduce_(state.team, self._groups)
            self._prune(state, self.ratio)

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}  # it has acted before the first group

    # -- the cut ------------------------------------------------------------------------------------------------------

    def _prune(self, state: State, ratio: float) -> None:
        """Cut every group down to its size at this share."""
        model = state.model
        self._follow_layers(model)
        units: list[tuple[Group, Tensor]] = []
        for group in self._groups.values():
            count = units_to_keep(group.dense, ratio, self.round_to)
            if count < group.units:
                scores_U = self._statistics.scores(model, group, self.importance)
                units.append((group, strongest(scores_U, count)))
        if units:
            cut = cut_of(units, {name: t.shape for name, t in tensors_of(model).items()})
            by_head = units if self._kind == "heads" else []
            attributes = {g.name: head_counts(model.get_submodule(g.name), len(index), g.units) for g, index in by_head}
            cut_tensors(model, cut, state.optimizer, attributes, self._config(model, units))
            self._steps = len(record_of(model))
            indices = {group.name: index for group, index in units}
            self._groups = {name: renumbered(g, indices.get(name), cut) for name, g in self._groups.items()}
            self._statistics.forget(indices)
            self._report(state, model)
        if self._done:
            self.remove_hooks()

    def _config(self, model: nn.Module, units: list[tuple[Group, Tensor]]) -> dict[str, int]:
        """New values of the config of a transformers model."""
        fields: dict[str, int] = {}
        for group, index in units if is_transformers(model) else ():
            if self._kind == "mlp":
                fields |= mlp_fields(model.config, group.units, len(index))
            else:
                dim: int = model.get_submodule(group.name).head_dim  # type: ignore[assignment]
                fields |= head_fields(model.config, group.units, len(index), dim)
        return fields

    def _report(self, state: State, model: nn.Module) -> None:
        tensors, kind = tensors_of(model), UNITS[self._kind]
        total = f"the model: {self._before} -> {sum(p.numel() for p in model.parameters())} parameters"
        for group in self._groups.values():
            if group.units < group.dense:
                params = sum(tensors[name].numel() for name in {piece.tensor for piece in group.slices})
                scheme = f"{group.dense} -> {group.units} {kind}"
                row = state.ledger.add(group.name, "structured", scheme=scheme, params=params)
                row.flags[:] = [total, *(flag for flag in row.flags if not flag.startswith("the model:"))]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        groups = {"groups": group_state(self._groups.values()), **self._statistics.state_dict()}
        progress = {"late": self._late, "before": self._before, "steps": self._steps}
        return {**super().state_dict(), **groups, **progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["groups"]:
            self._groups = {g.name: g for g in group_from_state(state["groups"])}
        self._statistics.load_state_dict(state)
        self._late, self._before, self._steps = state["late"], state["before"], state["steps"]
