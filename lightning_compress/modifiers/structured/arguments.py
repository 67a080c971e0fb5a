"""The arguments of structured pruning: which units, how many of them go, by what they are ranked, and when."""

from typing import Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from lightning_compress.core.modifier import Modifier
from lightning_compress.layers.matching import Names, select, shortlist
from lightning_compress.layers.split_experts import fused_experts
from lightning_compress.modifiers.structured.graph import CONVS
from lightning_compress.modifiers.structured.unit_statistics import Importance
from lightning_compress.pruning.schedules import Schedule, progress, value_at
from lightning_compress.structure.blocks import find_heads, find_mlps
from lightning_compress.structure.config import is_transformers
from lightning_compress.structure.groups import Group, units_to_keep

__all__ = ["UNITS", "Dimension", "StructuredArguments"]

Dimension = Literal["auto", "mlp", "heads", "channels"]
UNITS = {"mlp": "neurons", "heads": "key/value heads", "channels": "channels"}


class StructuredArguments(Modifier):
    """The units to prune, and their number; the fields are documented in StructuredPruningModifier."""

    dimension: Dimension = "mlp"
    targets: Names | None = None
    ignore: Names = []
    ratio: float = Field(default=0.25, ge=0, lt=1)
    importance: Importance = "magnitude"
    schedule: Schedule = "linear"
    power: float = 3.0
    round_to: int = Field(default=1, ge=1)
    input_shape: list[int] | None = None

    _kind: Dimension = PrivateAttr(default="mlp")  # dimension, with auto settled by the model

    @model_validator(mode="after")
    def _arguments_fit(self) -> "StructuredArguments":
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
        return self

    def settle(self, model: nn.Module) -> None:
        """Replace ``auto`` by ``mlp`` or ``channels``."""
        if self._kind == "auto":
            self._kind = "mlp" if is_transformers(model) or find_mlps(model) else "channels"

    def channel_targets(self, model: nn.Module) -> dict[str, nn.Module]:
        kinds = (nn.Linear, *CONVS)
        kinds_in_model = [kind.__name__ for kind in kinds if any(isinstance(m, kind) for m in model.modules())]
        layers = select(model, self.targets or kinds_in_model or ["Linear"], self.ignore)
        if wrong := [f"{n} ({type(m).__name__})" for n, m in layers.items() if not isinstance(m, kinds)]:
            raise ValueError(f"targets without output channels: {', '.join(wrong[:5])}; name Linears and convolutions")
        return layers

    def block_groups(self, model: nn.Module) -> list[Group]:
        groups = find_mlps(model) if self._kind == "mlp" else find_heads(model)
        fused = fused_experts(model) if self._kind == "mlp" else {}
        groups = [group for group in groups if not any(group.name.startswith(f"{name}.") for name in fused)]
        if not groups and fused:
            raise ValueError(
                f"the MLPs of {shortlist(map(repr, fused))} are experts of a mixture in one tensor, which cannot "
                f"become narrower one by one; use REAPModifier, which removes whole experts, or dimension='heads'"
            )
        if not groups:
            expected = "MLP (such as gate_proj, up_proj, down_proj, or fc1, fc2)"
            if self._kind == "heads":
                expected = "attention with q_proj, k_proj, v_proj, o_proj and a head_dim"
            override = self.override("dimension", "channels")
            raise ValueError(f"found no {expected} in this {type(model).__name__}; use dimension='channels'{override}")
        if self.targets is None and not self.ignore:
            return groups
        names = [g.name for g in groups]
        targets = select(model, self.targets or names, self.ignore)
        if not (groups := [g for g in groups if g.name in targets]):
            raise ValueError(
                f"targets={self.targets} matches no {self._kind} group: a target names the module that holds one, "
                f"such as {names[0]!r} or {type(model.get_submodule(names[0])).__name__!r}"
            )
        return groups

    def check_size(self, name: str, units: int) -> None:
        kind, count = UNITS[self._kind], units_to_keep(units, self.ratio, self.round_to)
        if count < 1:
            raise ValueError(f"ratio={self.ratio} leaves none of the {units} {kind} of {name!r}; take less")
        if self._kind == "heads" and abs(self.ratio * units - round(self.ratio * units)) > 1e-6:
            ratios = ", ".join(f"{i / units:.4g}" for i in range(1, units))
            raise ValueError(
                f"ratio={self.ratio} cuts through the {units} {kind} of {name!r}, which are removed as a unit with all "
                f"queries that share them; {f'give one of {ratios}' if ratios else 'use another dimension'}"
            )
        if count == units and self.ratio:
            raise ValueError(
                f"ratio={self.ratio} with round_to={self.round_to} removes none of the {units} {kind} of {name!r}; "
                f"take a larger ratio or a smaller round_to, or ignore it"
            )

    def ratio_at(self, index: float) -> float:
        """Share that is removed at a point in time."""
        assert self.start is not None
        end = self.start if self.end is None else self.end
        return value_at(self.schedule, progress(index, self.start, end), 0.0, self.ratio, self.power)
