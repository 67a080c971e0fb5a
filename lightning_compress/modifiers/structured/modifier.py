r"""Structured pruning: channels, neurons of MLPs and attention heads go for real, so the model is smaller and faster.

    score_u          importance of unit u over all tensors that hold a part of it      pruning/importance.py
    keep             the n - floor(ratio n) strongest units of each group, rounded up to a multiple of round_to

Muralidharan et al. 2024 (Minitron), arXiv:2407.14679 (MLPs and heads by activations); Molchanov et al. 2019,
arXiv:1906.10771 (Taylor); Fang et al. 2023, arXiv:2301.12900 (channels through residuals and norms, torch-pruning).

Parameters are replaced by smaller ones. The optimizer's groups get those, and its state is cut along with them. What
was cut is part of every checkpoint, and of config.json where the model has one.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.precision import model_precision
from lightning_compress.core.state import State
from lightning_compress.distributed import world_size
from lightning_compress.layers.matching import Names, listed, select
from lightning_compress.modifiers.structured.graph import check_installed, find_channels, output_size
from lightning_compress.modifiers.structured.trial import check_cut
from lightning_compress.pruning.importance import input_energy, strongest, unit_gate_gradient, unit_square_sum
from lightning_compress.pruning.schedules import Schedule, progress, value_at
from lightning_compress.structure.blocks import find_heads, find_mlps, head_counts
from lightning_compress.structure.config import check_states, head_fields, is_transformers, mlp_fields
from lightning_compress.structure.final_shapes import shape_conflict
from lightning_compress.structure.groups import (
    Cut,
    Group,
    cut_of,
    group_from_state,
    group_state,
    moved,
    renumbered,
    units_to_keep,
    without_layers,
)
from lightning_compress.structure.surgery import cut_tensors, record_of, tensors_of

__all__ = ["StructuredPruningModifier"]

Dimension = Literal["auto", "mlp", "heads", "channels"]
UNITS = {"mlp": "neurons", "heads": "key/value heads", "channels": "channels"}


class StructuredPruningModifier(Modifier):
    """Remove the least important units: at set-up (``start=0``), while training, or after it (no window).

    Args:
        dimension: ``mlp``: neurons of the MLPs of transformer blocks. ``heads``: their attention heads, key/value heads
            with all queries that share them. ``channels``: outputs of Linears and convolutions in any network, with
            everything that hangs on them (needs the package torch-pruning). ``auto``: ``mlp`` where there are MLPs of
            transformer blocks, else ``channels``.
        targets: For ``channels`` the layers whose outputs are pruned, by default Linears and convolutions; for the
            others the MLPs or attentions, by default all.
        ignore: What to leave out of ``targets``.
        ratio: Share of the units of each group that goes, in [0, 1).
        importance: ``magnitude``; ``taylor`` (gradients of the batches before the cut); ``activation`` (inputs in these
            batches, or the calibration batches where there is no window).
        schedule: How the share grows from ``start`` to ``end``; without ``end`` all goes at ``start``.
        power: Exponent of ``polynomial``.
        round_to: Numbers of units stay multiples of this, for the hardware and for groups of a later quantization.
        input_shape: Shape of one sample (floats), so that ``channels`` can be followed at set-up; by default they are
            followed in the first forward pass.

    Raises:
        ValueError: A ratio outside of [0, 1), one that removes nothing or everything or cuts through groups of query
            heads, targets that match nothing, layers that cannot be cut, a config that cannot state the new sizes,
            several processes and a cut that is not at set-up.
        ImportError: ``channels`` without torch-pruning.
    """

    dimension: Dimension = "mlp"
    targets: Names | None = None
    ignore: Names = []
    ratio: float = Field(default=0.25, ge=0, lt=1)
    importance: Literal["magnitude", "taylor", "activation"] = "magnitude"
    schedule: Schedule = "linear"
    power: float = 3.0
    round_to: int = Field(default=1, ge=1)
    input_shape: list[int] | None = None

    _kind: Dimension = PrivateAttr(default="mlp")  # dimension, with auto settled by the model
    _groups: dict[str, Group] = PrivateAttr(default_factory=dict)
    _sums: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # of the statistic, [U]
    _seen: dict[str, int] = PrivateAttr(default_factory=dict)  # tokens, or steps
    _in_batch: bool = PrivateAttr(default=False)
    _late: bool = PrivateAttr(default=False)  # started before the channels were known
    _steps: int = PrivateAttr(default=0)  # cuts in the model that the groups know of
    _before: int = PrivateAttr(default=0)  # parameters of the dense model

    @model_validator(mode="after")
    def _arguments_fit(self) -> "StructuredPruningModifier":
        self._kind = self.dimension
        if self.input_shape is not None and self.dimension not in ("auto", "channels"):
            raise ValueError(f"input_shape is for dimension='channels'; {self.dimension!r} needs no forward pass")
        if self.importance == "taylor" and self.start is None:
            raise ValueError("importance='taylor' needs gradients: give start, after some steps of training")
        if self.importance != "magnitude" and self.start == 0 and (self.end is None or self.schedule == "constant"):
            raise ValueError(
                f"importance={self.importance!r} needs batches before the cut, and start=0 cuts at set-up: give a "
                f"later start, an end with a schedule that begins at 0, or importance='magnitude'"
            )
        if self.update and self.start is not None and self.end is not None and self.update > self.end - self.start:
            raise ValueError(
                f"update={self.update} is larger than the window from {self.start} to {self.end} ({self.unit}): give "
                f"at most {self.end - self.start:g}"
            )
        return self

    @property
    def needs(self) -> Needs:
        followed = self._kind not in ("auto", "channels") or self.input_shape is not None
        measured = self.start is None and (self.importance == "activation" or not followed)
        return Needs(data=measured, survey=measured, changes_shapes=True)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find what hangs together, and refuse what cannot be done, before any training."""
        assert state.model is not None
        model = state.model
        self._settle(model)
        self._before, self._steps = sum(p.numel() for p in model.parameters()), len(record_of(model))
        known = self._kind != "channels" or self.input_shape is not None
        if world_size() > 1 and self.start is not None and not (self.start == 0 and self.end is None and known):
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
            sizes = {name: output_size(module) for name, module in self._channel_targets(model).items()}
            self._check_size(*max(sizes.items(), key=lambda pair: pair[1]))  # small ones may make the output
            if self.input_shape is not None:
                parameter = next(model.parameters())
                sample = torch.zeros(2, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
                self._follow_channels(state, (sample,), {})
        else:
            self._take(self._block_groups(model))
            self._check_config(model)
        if self.start is not None:
            self._observe(state)
        return True

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        assert state.model is not None
        self._settle(state.model)
        if self._kind == "channels" or other.needs.fixed_shapes_from == "never":
            return shape_conflict(self, other, other.touches(state), earlier)
        tensors = {piece.tensor for group in self._block_groups(state.model) for piece in group.slices}
        shared = other.touches(state) & {name.rpartition(".")[0] for name in tensors}
        return shape_conflict(self, other, shared, earlier)

    def _settle(self, model: nn.Module) -> None:
        """``auto`` becomes ``mlp`` or ``channels``."""
        if self._kind == "auto":
            self._kind = "mlp" if is_transformers(model) or find_mlps(model) else "channels"

    def _channel_targets(self, model: nn.Module) -> dict[str, nn.Module]:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        there = [kind.__name__ for kind in kinds if any(isinstance(m, kind) for m in model.modules())]
        chosen = select(model, self.targets or there or ["Linear"], self.ignore)
        if wrong := [f"{n} ({type(m).__name__})" for n, m in chosen.items() if not isinstance(m, kinds)]:
            raise ValueError(f"targets without output channels: {', '.join(wrong[:5])}; name Linears and convolutions")
        return chosen

    def _block_groups(self, model: nn.Module) -> list[Group]:
        found = find_mlps(model) if self._kind == "mlp" else find_heads(model)
        if not found:
            what = "MLP (such as gate_proj, up_proj, down_proj, or fc1, fc2)"
            if self._kind == "heads":
                what = "attention with q_proj, k_proj, v_proj, o_proj and a head_dim"
            typed = self.override("dimension", "channels")
            raise ValueError(f"found no {what} in this {type(model).__name__}; use dimension='channels'{typed}")
        if self.targets is None and not self.ignore:
            return found
        names = [g.name for g in found]
        chosen = select(model, self.targets or names, self.ignore)
        if not (kept := [g for g in found if g.name in chosen]):
            raise ValueError(
                f"targets={self.targets} matches no {self._kind} group: a target names the module that holds one, "
                f"such as {names[0]!r} or {type(model.get_submodule(names[0])).__name__!r}"
            )
        return kept

    def _take(self, groups: list[Group]) -> None:
        for group in groups:
            self._check_size(group.name, group.units)
        self._groups = {group.name: group for group in groups}

    def _check_size(self, name: str, units: int) -> None:
        what, kept = UNITS[self._kind], units_to_keep(units, self.ratio, self.round_to)
        if kept < 1:
            raise ValueError(f"ratio={self.ratio} leaves none of the {units} {what} of {name!r}; take less")
        if self._kind == "heads" and abs(self.ratio * units - round(self.ratio * units)) > 1e-6:
            whole = ", ".join(f"{i / units:.4g}" for i in range(1, units))
            raise ValueError(
                f"ratio={self.ratio} cuts through the {units} {what} of {name!r}, which go whole, with all queries "
                f"that share them; {f'give one of {whole}' if whole else 'there is only one: use another dimension'}"
            )
        if kept == units and self.ratio:
            raise ValueError(
                f"ratio={self.ratio} with round_to={self.round_to} removes none of the {units} {what} of {name!r}; "
                f"take a larger ratio or a smaller round_to, or ignore it"
            )

    def _check_config(self, model: nn.Module) -> None:
        """Of transformers: all sizes at the end must be what a config can state."""
        if not is_transformers(model):
            return
        kept = [(g, torch.arange(units_to_keep(g.dense, self.ratio, self.round_to))) for g in self._groups.values()]
        tensors = tensors_of(model)
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        for name, along in cut_of(kept, {n: t.shape for n, t in tensors.items()}).items():
            for dim, places in along.items():
                shapes[name][dim] = len(places)
        advice = "prune all blocks alike (no targets, no ignore), or another dimension"
        check_states(model, self._config(model, kept), shapes, advice)

    def _follow_channels(self, state: State, args: Any, kwargs: Any) -> None:
        assert state.model is not None
        targets = self._channel_targets(state.model)
        with model_precision():
            groups, outputs = find_channels(state.model, targets, args, kwargs)
        if named := [name for name in outputs if name in listed(self.targets or [])]:
            raise ValueError(f"target {named[0]!r} makes the output of the model, whose size is given; leave it out")
        for name in outputs:
            state.ledger.add(name, "structured", flag="left whole: it makes the output of the model")
        if not groups:
            raise ValueError(f"every target makes the output of the model ({', '.join(outputs)}): nothing to prune")
        self._take(groups)
        counts = [units_to_keep(group.dense, self.ratio, self.round_to) for group in groups]
        check_cut(state.model, groups, counts, args, kwargs)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _observe(self, state: State) -> None:
        """Hooks that follow channels and watch activations; gradients come with OPTIM_PRE_STEP."""
        assert state.model is not None
        if self._kind == "channels" and not self._groups:
            self.hook(state.model, self._first_forward(state), with_kwargs=True)
        else:
            self._watch(state.model)

    def _first_forward(self, state: State) -> Callable[..., None]:
        def follow(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._groups:
                with self.paused():
                    self._follow_channels(state, args, kwargs)
                self._watch(module)

        return follow

    def _watch(self, model: nn.Module) -> None:
        if self.importance != "activation":
            return
        for name, group in self._groups.items():
            for place, piece in enumerate(group.slices):
                if piece.consumer:
                    reader = model.get_submodule(piece.tensor.rpartition(".")[0])
                    self.hook(reader, self._watcher(name, place))

    def _watcher(self, name: str, place: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any) -> None:
            if self.start is not None and not self._in_batch:  # validation
                return
            group = self._groups[name]
            channel_dim = 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
            energy, tokens = input_energy(args[0], channel_dim, group.slices[place].index, self.token_mask)
            self._add(name, energy, tokens)

        return watch

    def _add(self, name: str, value_U: Tensor, count: int) -> None:
        before = self._sums.get(name)
        self._sums[name] = value_U.double() if before is None else before.to(value_U.device) + value_U
        self._seen[name] = self._seen.get(name, 0) + count

    @property
    def _done(self) -> bool:
        """Nothing more will go."""
        return all(g.units == units_to_keep(g.dense, self.ratio, self.round_to) for g in self._groups.values())

    def _follow_layers(self, model: nn.Module) -> None:
        """Where another modifier has taken layers out, groups in them go and later ones have new names."""
        steps = record_of(model)
        for path, kept in (pair for step in steps[self._steps :] for pair in step.get("layers", {}).items()):
            left = {name: without_layers(group, path, kept) for name, group in self._groups.items()}
            self._groups = {group.name: group for group in left.values() if group is not None}
            self._sums = {new: v for name, v in self._sums.items() if (new := moved(name, path, kept)) is not None}
            self._seen = {new: v for name, v in self._seen.items() if (new := moved(name, path, kept)) is not None}
            if self.hooked:
                self.remove_hooks()
                self._watch(model)
        self._steps = len(steps)

    def _add_gradients(self, model: nn.Module) -> None:
        tensors = tensors_of(model)
        for name, group in self._groups.items():
            pieces = [(p, tensors[p.tensor]) for p in group.slices if tensors[p.tensor].dim() > 1]
            gates = [unit_gate_gradient(W, W.grad, p.dim, p.index).square() for p, W in pieces if W.grad is not None]
            if gates:
                self._add(name, torch.stack(gates).sum(0), 1)

    def _scores(self, model: nn.Module, group: Group) -> Tensor:
        """Importance of each unit, float [U], on the CPU."""
        if self.importance == "magnitude":
            tensors = tensors_of(model)
            matrices = [(p, tensors[p.tensor]) for p in group.slices if tensors[p.tensor].dim() > 1]
            none = torch.zeros(group.units, dtype=torch.float32)
            return sum((unit_square_sum(W, p.dim, p.index).cpu() for p, W in matrices), none).sqrt()
        if not self._seen.get(group.name):
            raise ValueError(
                f"{self.name}: importance={self.importance!r}, but {group.name!r} saw no batch before the cut; give a "
                f"later start, or calibration batches"
            )
        return (self._sums[group.name] / self._seen[group.name]).sqrt().cpu()

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
            assert state.model is not None
            self._follow_layers(state.model)
        if event.type_ == EventType.OPTIM_PRE_STEP and self.importance == "taylor" and self.start is not None:
            assert state.model is not None
            self._follow_layers(state.model)
            if not self._done:
                self._add_gradients(state.model)
        elif event.type_ == EventType.BATCH_END and self._late and self._groups:
            self._advance(state, event)

    def ratio_at(self, index: float) -> float:
        """Share that is gone at a point in time."""
        assert self.start is not None
        end = self.start if self.end is None else self.end
        return value_at(self.schedule, progress(index, self.start, end), 0.0, self.ratio, self.power)

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
        if not state.block_name:  # the last one: what lies outside blocks
            self.remove_hooks()
            self._prune(state, self.ratio)

    # -- the cut ------------------------------------------------------------------------------------------------------

    def _prune(self, state: State, ratio: float) -> None:
        """Cut every group down to its size at this share."""
        assert state.model is not None
        model = state.model
        self._follow_layers(model)
        kept = []
        for group in self._groups.values():
            count = units_to_keep(group.dense, ratio, self.round_to)
            if count < group.units:
                kept.append((group, strongest(self._scores(model, group), count)))
        if kept:
            tensors = tensors_of(model)
            cut = cut_of(kept, {name: t.shape for name, t in tensors.items()})
            attributes = self._attributes(model, kept)
            cut_tensors(model, cut, _optimizers(state), attributes, self._config(model, kept))
            self._steps = len(record_of(model))
            self._renumber(kept, cut)
            self._report(state, model)
        if self._done:
            self.remove_hooks()

    def _renumber(self, kept: list[tuple[Group, Tensor]], cut: Cut) -> None:
        units = {group.name: places for group, places in kept}
        self._groups = {name: renumbered(g, units.get(name), cut) for name, g in self._groups.items()}
        for name in units:
            self._sums.pop(name, None)
            self._seen.pop(name, None)

    def _attributes(self, model: nn.Module, kept: list[tuple[Group, Tensor]]) -> dict[str, dict[str, int]]:
        if self._kind != "heads":
            return {}
        return {g.name: head_counts(model.get_submodule(g.name), len(units), g.units) for g, units in kept}

    def _config(self, model: nn.Module, kept: list[tuple[Group, Tensor]]) -> dict[str, int]:
        """New values of the config of a transformers model."""
        fields: dict[str, int] = {}
        for group, units in kept if is_transformers(model) else ():
            if self._kind == "mlp":
                fields |= mlp_fields(model.config, group.units, len(units))
            else:
                dim: int = model.get_submodule(group.name).head_dim  # type: ignore[assignment]
                fields |= head_fields(model.config, group.units, len(units), dim)
        return fields

    def _report(self, state: State, model: nn.Module) -> None:
        tensors, what = tensors_of(model), UNITS[self._kind]
        said = f"the model: {self._before} -> {sum(p.numel() for p in model.parameters())} parameters"
        for group in self._groups.values():
            if group.units < group.dense:
                now = _weights_of(tensors, group)
                row = state.ledger.add(
                    group.name, "structured", scheme=f"{group.dense} -> {group.units} {what}", params=now
                )
                row.flags[:] = [said, *(flag for flag in row.flags if not flag.startswith("the model:"))]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        own = {
            "groups": group_state(self._groups.values()),
            "sums": dict(self._sums),
            "seen": dict(self._seen),
            "late": self._late,
            "before": self._before,
            "steps": self._steps,
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["groups"]:
            self._groups = {g.name: g for g in group_from_state(state["groups"])}
        self._sums, self._seen = dict(state["sums"]), dict(state["seen"])
        self._late, self._before, self._steps = state["late"], state["before"], state["steps"]


def _weights_of(tensors: dict[str, Tensor], group: Group) -> int:
    return sum(tensors[name].numel() for name in {piece.tensor for piece in group.slices})


def _optimizers(state: State) -> list[Optimizer]:
    if state.optimizer is None:
        return []
    return list(state.optimizer) if isinstance(state.optimizer, list | tuple) else [state.optimizer]
