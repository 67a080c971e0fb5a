"""Rotation: turn the bases in which a model computes, so that no channel stands out and rounding loses less.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu et al. 2024, arXiv:2405.16406), the incoherence half of
QuIP# (Tseng et al. 2024, arXiv:2402.04396). For orthogonal R

    R1    residual stream    E R;  W R of all that read it, R^T W of all that write it (gains of norms folded in first)
    R2    values of heads    R^T W_v head by head, W_o R

are written into the weights: the model computes what it did before, and any loader loads it. What reads which basis is
found by following one run (modifiers/rotation/follow.py), and a second run sees that the outputs are unchanged.

LayerNorm commutes with rotations that leave the vector of ones where it is: streams with LayerNorm get such ones,
H diag(1, +-1, ...) H^T / n instead of diag(+-1) H / sqrt(n), and nothing has to be centered.
"""

import logging
import time
import warnings
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Generator, Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.matching import Names, listed, match_rank, select
from lightning_compress.layers.matrix import inputs_as_rows
from lightning_compress.modifiers.rotation.discover import Found, discover
from lightning_compress.modifiers.rotation.follow import Followed
from lightning_compress.modifiers.rotation.fuse import Fused, fuse
from lightning_compress.modifiers.rotation.learn import TokenSample, learn_rotation, readers_of
from lightning_compress.modifiers.rotation.plan import Matrices, Plan, make_plan, put_beside

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
        learn: Train R1 on the calibration data, so that what reads the stream loses least when it and its inputs are
            rounded to ``learn_bits``.
        learn_steps: Of descent.
        learn_rate: Mean angle of the first step, in radians; it falls linearly to zero.
        learn_tokens: Vectors of each norm that are looked at.
        learn_bits: Of weights and activations in the loss.
        targets: Of ``v`` and ``u``: class names, dotted names or ``re:`` patterns.
        ignore: The same, for what is left out, also from what ``learn`` looks at.
    """

    rotations: list[Rotation] = Field(default=["R1", "R2"], min_length=1)
    transform_type: Literal["hadamard", "random-hadamard", "random-matrix"] = "random-hadamard"
    transform_block_size: int | None = Field(default=None, ge=2)
    seed: int = 0
    tolerance: float | None = Field(default=None, gt=0)
    allow_online: bool = False
    learn: bool = False
    learn_steps: int = Field(default=100, ge=1)
    learn_rate: float = Field(default=0.02, gt=0)
    learn_tokens: int = Field(default=512, ge=1)
    learn_bits: int = Field(default=4, ge=2, le=8)
    targets: Names = ["Linear"]
    ignore: Names = ["re:.*lm_head"]

    _found: Found | None = PrivateAttr(default=None)
    _pending: Plan | None = PrivateAttr(default=None)  # with ``learn``: what waits for the data
    _samples: dict[str, TokenSample] = PrivateAttr(default_factory=dict)  # by name of the norm

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
        if self.learn and ("R1" not in self.rotations or self.transform_block_size is not None):
            raise ValueError(
                f"learn=True trains R1 as a whole, and here rotations={self.rotations}, "
                f"transform_block_size={self.transform_block_size}; name R1, and leave the block size out"
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs(data=self.learn, survey=self.learn, one_pass=True)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        model = _model(state)
        with model_precision():
            found = discover(model)
        self._plan(model, found.followed)
        return True

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.learn:
            self._prepare(state)
            self._rotate(state)

    def _prepare(self, state: State) -> Plan:
        model = _model(state)
        with model_precision():
            self._found = discover(model)
        self._pending = self._plan(model, self._found.followed)
        return self._pending

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.learn:
            return
        model, plan = _model(state), self._prepare(state)
        generator = Generator().manual_seed(self.seed)
        for stream, _ in plan.streams:
            for norm in stream.norms:
                if norm.module not in self._samples:
                    sample = self._samples[norm.module] = TokenSample(self.learn_tokens, generator)
                    self.hook(model.get_submodule(norm.module), lambda m, args, to=sample: self._keep(to, m, args[0]))

    def _keep(self, sample: TokenSample, module: nn.Module, x: Tensor) -> None:
        sample.update(inputs_as_rows(module, x, self.token_mask)[0])

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if state.block is None:  # the last of the survey: all has been seen
            self.remove_hooks()
            self._learn(state)
            self._rotate(state)

    def _learn(self, state: State) -> None:
        """Put a better R in place of each stream's."""
        model, plan, start = _model(state), self._pending, time.perf_counter()
        assert plan is not None
        for stream, R in list(plan.streams):
            readers = []
            for norm in dict.fromkeys(stream.norms):
                seen = self._samples[norm.module].value()
                reader = None if seen is None else readers_of(model, stream, norm, seen, self._is_ignored)
                readers += [] if reader is None else [reader]
            if not readers:
                raise ValueError("learn=True: no weight reads the residual stream through a norm; set learn=False")
            generator = Generator().manual_seed(self.seed)
            learned = learn_rotation(
                R, readers, self.learn_steps, self.learn_rate, self.learn_bits, generator, stream.centered
            )
            plan.swap(R, learned.R)
            done = f"R1 learned: loss {learned.before:.3g} to {learned.after:.3g}"
            state.ledger.add(stream.sources[0].slot.module, "rotation", flag=done)
            logger.info("%s in %.0f s", done, time.perf_counter() - start)
        self._samples = {}

    def _is_ignored(self, name: str) -> bool:
        return any(match_rank(name, nn.Identity(), entry) for entry in listed(self.ignore))

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """All is done before the first module is ready, so that those behind may finish module by module."""

    def _rotate(self, state: State) -> None:
        model, found, plan, start = _model(state), self._found, self._pending, time.perf_counter()
        assert found is not None
        assert plan is not None
        self._found = self._pending = None
        run = model_precision()(found.run)
        fused = fuse(model, plan.turns, plan.norms, run, self.tolerance, lambda: put_beside(model, plan.beside))
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
