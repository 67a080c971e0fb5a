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

from pydantic import Field
from torch import Generator, Tensor, nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.maths.hadamard import check_order, hadamard, random_hadamard, random_orthogonal
from lightning_compress.rotation.discover import Found, discover, heads_of, streams_of
from lightning_compress.rotation.fuse import Fused, Turn, fuse, turns_of_heads, turns_of_space
from lightning_compress.rotation.spaces import Norm

__all__ = ["QuIPModifier", "RotationModifier", "SpinQuantModifier"]

logger = logging.getLogger(__name__)

Rotation = Literal["R1", "R2"]


class RotationModifier(Modifier):
    """Rotate a model before it is quantized, without changing what it computes.

    Acts when calibration begins, so it stands before the modifiers that quantize. Embeddings that are tied to the head
    are untied where the gain of the last norm must go into the head.

    Args:
        rotations: ``R1``: the residual stream. ``R2``: the values of attention heads.
        transform_type: ``random-hadamard``: signs and a Hadamard matrix. ``hadamard``: no signs (streams with LayerNorm
            need some, and get them). ``random-matrix``: any orthogonal matrix, for sizes without a Hadamard matrix.
        transform_block_size: Rotate this many neighbouring features among themselves; None: all of them.
        seed: Of signs and matrices.
        tolerance: How far outputs may move, as a share of the largest; None: 1e-5, and 5e-2 for 16-bit weights.
    """

    needs_calibration: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True

    rotations: list[Rotation] = Field(default=["R1", "R2"], min_length=1)
    transform_type: Literal["hadamard", "random-hadamard", "random-matrix"] = "random-hadamard"
    transform_block_size: int | None = Field(default=None, ge=2)
    seed: int = 0
    tolerance: float | None = Field(default=None, gt=0)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self._plan(state.model, discover(state.model))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._rotate(state)

    def _rotate(self, state: State) -> None:
        model, start = state.model, time.perf_counter()
        assert model is not None
        found = discover(model)
        turns, norms = self._plan(model, found)
        fused = fuse(model, turns, norms, found.run, self.tolerance)
        self._report(state, fused, time.perf_counter() - start)

    def _plan(self, model: nn.Module, found: Found) -> tuple[list[Turn], list[tuple[Norm, Tensor]]]:
        """What is turned by what. ValueError for what cannot be."""
        generator = Generator().manual_seed(self.seed)
        turns: list[Turn] = []
        norms: list[tuple[Norm, Tensor]] = []
        if "R1" in self.rotations:
            for stream in streams_of(found.followed, model):
                R = self._matrix("R1", stream.size, generator, stream.centered)
                turns += turns_of_space(stream, R)
                norms += [(norm, R) for norm in stream.norms]
        if "R2" in self.rotations:
            heads = heads_of(found.followed, model)
            turns += turns_of_heads(heads, lambda head: self._matrix("R2", head.size, generator))
        return turns, norms

    def _matrix(self, rotation: str, size: int, generator: Generator, keep_mean: bool = False) -> Tensor:
        """R [h, h] float64; h is ``size`` or the block size."""
        block = min(self.transform_block_size or size, size)
        if size % block:
            raise ValueError(f"transform_block_size={block} does not divide the {size} features of {rotation}")
        if self.transform_type == "random-matrix":
            return random_orthogonal(block, generator, keep_mean=keep_mean)
        try:
            check_order(block)
        except ValueError as error:
            raise ValueError(
                f"{rotation} rotates {size} features: {error}; set transform_block_size, or "
                f"transform_type='random-matrix', which has every size"
            ) from None
        if self.transform_type == "hadamard" and not keep_mean:
            return hadamard(block) / block**0.5
        return random_hadamard(block, generator, keep_mean=keep_mean)

    def _report(self, state: State, fused: Fused, seconds: float) -> None:
        for name in fused.changed:
            module = name.rpartition(".")[0] or name
            state.ledger.add(module, "rotation")
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


class SpinQuantModifier(RotationModifier):
    """:class:`RotationModifier` under the name of SpinQuant: R1 and R2, learned with ``learn=True``."""


class QuIPModifier(RotationModifier):
    """:class:`RotationModifier` under the name of QuIP."""
