"""Rotation: turn the bases in which a model computes, so that no channel stands out and rounding loses less.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu et al. 2024, arXiv:2405.16406), the incoherence half of
QuIP# (Tseng et al. 2024, arXiv:2402.04396). For orthogonal R

    R1    residual stream    E R;  W R of all that read it, R^T W of all that write it (gains of norms folded in first)
    R2    values of heads    R^T W_v head by head, W_o R

are written into the weights: the model computes the same as before, and any loader loads it. Which weights share a
basis is seen in one run (follow.py), and a second run checks that the outputs are unchanged.

LayerNorm commutes with rotations that keep the vector of ones: streams with LayerNorm are rotated by one of these,
H diag(1, +-1, ...) H^T / n instead of diag(+-1) H / sqrt(n), and no weight has to be centered.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Generator, Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.matching import Names, listed, match_rank, select
from lightning_compress.layers.matrix import inputs_as_rows
from lightning_compress.modifiers.rotation.discover import discover
from lightning_compress.modifiers.rotation.fuse import Fusion, fuse
from lightning_compress.modifiers.rotation.learn import TokenSample, learn_rotation, readers_of
from lightning_compress.modifiers.rotation.plan import Matrices, RotationPlan, attach_online, make_plan

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
            need them and have them). ``random-matrix``: any orthogonal matrix, for sizes without a Hadamard matrix;
            online rotations are random-hadamard.
        transform_block_size: Rotate this many neighbouring features among themselves; None: all of them.
        seed: Seed of signs and matrices.
        tolerance: Largest change of an output, as a share of the largest output; None: 1e-5, or 5e-2 in 16 bits.
        allow_online: Allow rotations that cannot be fused into weights: they run at every call of a module. Only
            ``lightning_compress.load`` loads the export of such a model; other loaders refuse it.
        learn: Train R1 on the calibration data, so that the weights that read the stream lose least when they and
            their inputs are rounded to ``learn_bits``.
        learn_steps: Number of steps.
        learn_rate: Mean angle of the first step, in radians; it falls linearly to zero.
        learn_tokens: Number of vectors of each norm that are sampled.
        learn_bits: Bits of weights and activations in the loss.
        targets: Class names, dotted names or ``re:`` patterns of the layers that ``v`` and ``u`` rotate.
        ignore: Class names, dotted names or ``re:`` patterns of layers that are left out, also by ``learn``.
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

    _run: Callable[[], Any] | None = PrivateAttr(default=None)  # repeats the run that was traced
    _pending: RotationPlan | None = PrivateAttr(default=None)  # with ``learn`` until the data are seen
    _samples: dict[str, TokenSample] = PrivateAttr(default_factory=dict)  # by name of the norm

    @field_validator("rotations")
    @classmethod
    def _without_r3(cls, rotations: list[Rotation]) -> list[Rotation]:
        if "R3" in rotations:
            raise ValueError(
                "R3 turns queries and keys between their rotary embedding and their product, where no module ends and "
                "no loader would repeat it; it helps a quantized KV cache only: take ['R1', 'R2'], or 'R4' too"
            )
        return rotations

    @property
    def unread_by(self) -> tuple[str, ...]:
        return ("transformers", "vLLM") if self.allow_online else ()

    @model_validator(mode="after")
    def _online_is_allowed(self) -> "RotationModifier":
        if (online := [name for name in self.rotations if name in ONLINE]) and not self.allow_online:
            raise ValueError(
                f"rotations={self.rotations}: {', '.join(online)} must run beside modules at every call, and no other "
                f"loader does that (transformers 5.23 would compute something else); take rotations=['R1', 'R2'], "
                f"which are fused, or set allow_online=True: then only lightning_compress.load loads the export"
            )
        if self.learn and ("R1" not in self.rotations or self.transform_block_size is not None):
            raise ValueError(
                f"learn=True trains all of R1, and here rotations={self.rotations}, "
                f"transform_block_size={self.transform_block_size}; name R1, and leave the block size out"
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs(data=self.learn, survey=self.learn, one_pass=True, team="alone" if self.learn else "weights")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._prepare(state)  # refuses a model that cannot be rotated
        self._run = self._pending = None
        return True

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.learn:
            self._prepare(state)
            self._rotate(state)

    def _prepare(self, state: State) -> RotationPlan:
        """Plan the rotations of the model; ValueError where one is not possible."""
        model = _model(state)
        with model_precision(exact=True):
            trace, self._run = discover(model)
        matrices = Matrices(self.transform_type, self.transform_block_size, self.seed)
        rotations = list(dict.fromkeys(self.rotations))
        self._pending = make_plan(
            model, trace, rotations, lambda: select(model, self.targets, self.ignore), matrices, self.allow_online
        )
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
                    self.hook(model.get_submodule(norm.module), lambda m, args, s=sample: self._observe(s, m, args[0]))

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}  # it has acted before the first group

    def _observe(self, sample: TokenSample, module: nn.Module, x: Tensor) -> None:
        sample.update(inputs_as_rows(module, x, self.token_mask)[0])

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if state.block is None:  # the last event of the survey
            self.remove_hooks()
            self._learn(state)
            self._rotate(state)

    def _learn(self, state: State) -> None:
        """Replace R of each stream by a learned one."""
        model, plan, start = _model(state), self._pending, time.perf_counter()
        assert plan is not None
        for stream, R in list(plan.streams):
            readers = []
            for norm in dict.fromkeys(stream.norms):
                x_TC = self._samples[norm.module].value()
                reader = None if x_TC is None else readers_of(model, stream, norm, x_TC, self._is_ignored)
                readers += [] if reader is None else [reader]
            if not readers:
                raise ValueError("learn=True: no weight reads the residual stream through a norm; set learn=False")
            generator = Generator().manual_seed(self.seed)
            learned = learn_rotation(
                R, readers, self.learn_steps, self.learn_rate, self.learn_bits, generator, stream.centered
            )
            plan.swap(R, learned.R)
            note = f"R1 learned: loss {learned.before:.3g} to {learned.after:.3g}"
            state.ledger.add(stream.sources[0].slot.module, "rotation", flag=note)
            logger.info("%s in %.0f s", note, time.perf_counter() - start)
        self._samples = {}

    def _is_ignored(self, name: str) -> bool:
        return any(match_rank(name, nn.Identity(), entry) for entry in listed(self.ignore))

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing is left to do, so that later modifiers may finish module by module."""

    def _rotate(self, state: State) -> None:
        model, run, plan, start = _model(state), self._run, self._pending, time.perf_counter()
        assert run is not None
        assert plan is not None
        self._run = self._pending = None
        run = model_precision(exact=True)(run)
        fusion = fuse(model, plan.turns, plan.norms, run, self.tolerance, lambda: attach_online(model, plan.online))
        self._report(state, plan, fusion, time.perf_counter() - start)

    def _report(self, state: State, plan: RotationPlan, fusion: Fusion, seconds: float) -> None:
        for name in fusion.changed:
            module = name.rpartition(".")[0] or name
            sides = [record.side for record in plan.online.get(module, [])]
            state.ledger.add(module, "rotation", flag=f"{'+'.join(sides)} rotated online" if sides else None)
        first = fusion.changed[0].rpartition(".")[0] or fusion.changed[0]
        note = f"{'+'.join(self.rotations)} {self.transform_type}: outputs moved by {fusion.difference:.0e}"
        state.ledger.add(first, "rotation", flag=note, seconds=seconds)
        logger.info("%d weights rotated, %s", len(fusion.changed), note)
        if fusion.untied:
            for name in fusion.untied:
                state.ledger.add(name.rpartition(".")[0], "rotation", flag="untied")
            warnings.warn(
                f"{self.name}: {', '.join(fusion.untied)} shared its weight with the embeddings and no longer does; "
                f"the exported folder says so, but to load a .ckpt of this model, build it untied "
                f"(tie_word_embeddings=False)",
                stacklevel=2,
            )
        if plan.online:
            warnings.warn(
                f"{self.name}: rotations run beside {len(plan.online)} modules, such as {next(iter(plan.online))!r}; "
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
    """The model without the wrapper of torch.compile, so that its run can be watched."""
    assert state.model is not None
    inner = getattr(state.model, "_orig_mod", state.model)
    assert isinstance(inner, nn.Module)
    return inner
