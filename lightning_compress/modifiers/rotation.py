"""Rotation: turn the bases in which a model computes, so that no channel stands out and rounding loses less.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu et al. 2024, arXiv:2405.16406), the incoherence half of
QuIP# (Tseng et al. 2024, arXiv:2402.04396). For orthogonal R

    R1    residual stream    E R;  W R of all that read it, R^T W of all that write it (gains of norms folded in first)
    R2    values of heads    R^T W_v head by head, W_o R

are written into the weights: the model computes what it did before, and any loader loads it. What reads which basis is
found by following one run (rotation/follow.py), and a second run sees that the outputs are unchanged.

LayerNorm commutes with rotations that leave the vector of ones where it is: streams with LayerNorm get such ones,
H diag(1, +-1, ...) H^T / n instead of diag(+-1) H / sqrt(n), and nothing has to be centered.
"""

import logging
import time
import warnings
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.matching import select
from lightning_compress.rotation.discover import discover
from lightning_compress.rotation.follow import Followed
from lightning_compress.rotation.fuse import Fused, fuse
from lightning_compress.rotation.plan import Matrices, Plan, make_plan, put_beside

__all__ = ["QuIPModifier", "RotationModifier", "SpinQuantModifier"]

logger = logging.getLogger(__name__)

Rotation = Literal["R1", "R2", "R3", "R4", "v", "u"]
ONLINE = ("R4", "u")


class RotationModifier(Modifier):
    """Rotate a model before it is quantized, without changing what it computes.

    Acts when calibration begins, so it stands before the modifiers that quantize. Embeddings that are tied to the head
    are untied where the gain of the last norm must go into the head.

    Args:
        rotations: ``R1``: the residual stream. ``R2``: the values of attention heads. ``R4``: the inputs of the second
            half of each MLP. ``v``: the inputs of all targets, ``u``: their outputs; by R1 and R2 where they reach.
        transform_type: ``random-hadamard``: signs and a Hadamard matrix. ``hadamard``: no signs (streams with LayerNorm
            need some, and get them). ``random-matrix``: any orthogonal matrix, for sizes without a Hadamard matrix;
            beside modules random-hadamard.
        transform_block_size: Rotate this many neighbouring features among themselves; None: all of them.
        seed: Of signs and matrices.
        tolerance: How far outputs may move, as a share of the largest; None: 1e-5, and 5e-2 for 16-bit weights.
        allow_online: Let rotations that no weight can take in run beside modules. Only ``lightning_compress.load``
            loads the export of such a model; other loaders refuse it.
        targets: Of ``v`` and ``u``: class names, dotted names or ``re:`` patterns.
        ignore: The same, for what is left out.
    """

    needs_calibration: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True

    rotations: list[Rotation] = Field(default=["R1", "R2"], min_length=1)
    transform_type: Literal["hadamard", "random-hadamard", "random-matrix"] = "random-hadamard"
    transform_block_size: int | None = Field(default=None, ge=2)
    seed: int = 0
    tolerance: float | None = Field(default=None, gt=0)
    allow_online: bool = False
    targets: list[str] = ["Linear"]
    ignore: list[str] = ["re:.*lm_head"]

    @field_validator("rotations")
    @classmethod
    def _no_third(cls, rotations: list[Rotation]) -> list[Rotation]:
        if "R3" in rotations:
            raise ValueError(
                "R3 turns queries and keys between their rotary embedding and their product, where no module ends and "
                "no loader would do it again; it helps a quantized KV cache only: take ['R1', 'R2'], or 'R4' too"
            )
        return rotations

    @model_validator(mode="after")
    def _online_is_allowed(self) -> "RotationModifier":
        if (found := [name for name in self.rotations if name in ONLINE]) and not self.allow_online:
            raise ValueError(
                f"rotations={self.rotations}: {', '.join(found)} must run beside modules at every call, and no other "
                f"loader does that (transformers 5.23 would compute something else); take rotations=['R1', 'R2'], "
                f"which are fused, or set allow_online=True: then only lightning_compress.load loads the export"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        model = _model(state)
        self._plan(model, discover(model).followed)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._rotate(state)

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """All is done before the first module is ready, so that those behind may finish module by module."""

    def _rotate(self, state: State) -> None:
        model, start = _model(state), time.perf_counter()
        found = discover(model)
        plan = self._plan(model, found.followed)
        fused = fuse(model, plan.turns, plan.norms, found.run, self.tolerance, lambda: put_beside(model, plan.beside))
        self._report(state, plan, fused, time.perf_counter() - start)

    def _plan(self, model: nn.Module, followed: Followed) -> Plan:
        """What is turned by what. ValueError for what cannot be."""
        matrices = Matrices(self.transform_type, self.transform_block_size, self.seed)
        rotations = list(dict.fromkeys(self.rotations))
        return make_plan(
            model, followed, rotations, lambda: select(model, self.targets, self.ignore), matrices, self.allow_online
        )

    def _report(self, state: State, plan: Plan, fused: Fused, seconds: float) -> None:
        for name in fused.changed:
            module = name.rpartition(".")[0] or name
            sides = [online.side for online in plan.beside.get(module, [])]
            state.ledger.add(module, "rotation", flag=f"{'+'.join(sides)} rotated online" if sides else None)
        first = fused.changed[0].rpartition(".")[0] or fused.changed[0]
        done = f"{'+'.join(self.rotations)} {self.transform_type}: outputs moved by {fused.difference:.0e}"
        state.ledger.add(first, "rotation", flag=done, seconds=seconds)
        logger.info("%d weights rotated, %s", len(fused.changed), done)
        if fused.untied:
            for name in fused.untied:
                state.ledger.add(name.rpartition(".")[0], "rotation", flag="untied")
            warnings.warn(
                f"{self.name}: {', '.join(fused.untied)} shared its weight with the embeddings and has one of its own "
                f"now; the exported folder says so, but to load a .ckpt of this model, build it untied "
                f"(tie_word_embeddings=False)",
                stacklevel=2,
            )
        if plan.beside:
            warnings.warn(
                f"{self.name}: rotations run beside {len(plan.beside)} modules, such as {next(iter(plan.beside))!r}; "
                f"lightning_compress.load loads the exported folder, and a .ckpt of this model does not hold them",
                stacklevel=2,
            )


class SpinQuantModifier(RotationModifier):
    """:class:`RotationModifier` by the name of SpinQuant (arXiv:2405.16406): R1 and R2 unless others are named."""


class QuIPModifier(RotationModifier):
    """:class:`RotationModifier` by the name of QuIP# (arXiv:2402.04396): the inputs of all Linears, ``v``.

    R1 and R2 reach all of them but the second halves of MLPs; where a model has such, ``allow_online`` is needed.
    """

    rotations: list[Rotation] = Field(default=["v"], min_length=1)


def _model(state: State) -> nn.Module:
    """Without the wrapper of torch.compile, so that what runs can be followed."""
    assert state.model is not None
    inner = getattr(state.model, "_orig_mod", state.model)
    assert isinstance(inner, nn.Module)
    return inner
