"""A teacher's answers to a batch, from its cache where it has all samples, with counts of hits and misses.

The teacher runs on all samples of a batch if one is not in the cache, and samples in the cache keep their answers: so
the answers to a batch do not depend on how much of the cache an interrupted run had written.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.modifiers.distillation.answer_cache import AnswerCache
from lightning_compress.modifiers.distillation.fingerprint import real_lengths, sample_keys
from lightning_compress.team import Team

__all__ = ["Recall"]

KEY = 32  # bytes on disk of a sample's key, of where its rows end, and of its CRC
FEW = 0.1  # a later epoch with fewer hits than this ends the writing, with a warning


class Recall:
    """Reads answers from the cache, and runs the teacher for missing ones.

    Args:
        cache: Cache of this teacher.
    """

    def __init__(self, cache: AnswerCache) -> None:
        self.cache = cache
        self.epochs: list[list[int]] = [[0, 0]]  # hits and misses of each; all ranks once it is over
        self._estimated = False

    def answers(
        self,
        named: Mapping[str, Any],
        shape: Sequence[int],
        ask: Callable[[], Mapping[str, Tensor]],
        batches_per_epoch: int | None,
    ) -> dict[str, Tensor]:
        """The teacher's answers to a batch, [batch, tokens, ...] each, zeros for trailing padding.

        Args:
            named: Inputs of the model by name; labels do not count, and an ``attention_mask`` in the shape of the
                tokens marks padding.
            shape: Shape of the tokens, samples first: [batch] or [batch, tokens, ...].
            ask: Runs the teacher on the batch; the answers have the same form.
            batches_per_epoch: Number of batches on this rank, for an estimate of the size; None: unknown.
        """
        batch, padding = shape[0], named.get("attention_mask")
        cut = isinstance(padding, Tensor) and padding.dim() == 2 and padding.shape == tuple(shape)
        lengths = real_lengths(padding) if cut and isinstance(padding, Tensor) else None
        inputs = {name: value for name, value in named.items() if name != "labels"}
        keys = sample_keys(inputs, batch, lengths)
        known = [self.cache.get(key) for key in keys]
        hits = sum(answer is not None for answer in known)
        self.epochs[-1][0] += hits
        self.epochs[-1][1] += batch - hits
        fresh: Mapping[str, Tensor] = {}
        if hits < batch:
            fresh = ask()
            rows = [_cut(fresh, i, lengths) for i in range(batch)]
            if not self._estimated:
                self._estimate(rows, batches_per_epoch)
            for key, row in zip(keys, rows, strict=True):
                self.cache.put(key, row)
        answers = [
            answer or self.cache.get(key) or _cut(fresh, i, lengths)
            for i, (key, answer) in enumerate(zip(keys, known, strict=True))
        ]
        tokens = math.prod(shape[1:])
        return {part: _padded([answer[part] for answer in answers], tokens) for part in answers[0]}

    def close_epoch(self) -> None:
        """Write pending answers, add up counts over ranks, read their shards, and warn where the cache does not help.

        Every rank calls this at the same time.
        """
        self.cache.flush()
        hits, misses = self.epochs[-1]
        count = SimpleNamespace(reduce={"hits": "sum", "misses": "sum"}, hits=hits, misses=misses)
        Team.present().reduce_(count)
        self.cache.refresh()
        hits, misses = self.epochs[-1] = [count.hits, count.misses]
        if len(self.epochs) > 1 and not self.cache.full and hits < FEW * (hits + misses):
            self.cache.full = True
            warnings.warn(
                f"the teacher cache helps little: in epoch {len(self.epochs)} it had {hits:,} of {hits + misses:,} "
                f"samples, so inputs differ from epoch to epoch (augmentation, random crops, samples drawn anew); "
                f"no more answers are written ({self.cache.bytes / 2**20:,.1f} MiB so far). Leave out cache_dir, or "
                f"train on the same samples in every epoch",
                stacklevel=2,
            )
        self.epochs.append([0, 0])

    @property
    def summary(self) -> str:
        """One line for the ledger."""
        hits, misses = (sum(column) for column in zip(*self.epochs, strict=True))
        return (
            f"teacher cache: {hits:,} hits, {misses:,} misses, {len(self.cache):,} samples in "
            f"{self.cache.bytes / 2**20:,.1f} MiB"
        )

    def _estimate(self, rows: list[dict[str, Tensor]], batches_per_epoch: int | None) -> None:
        """Warn before hours of work when an epoch will not fit."""
        self._estimated = True
        if batches_per_epoch is None:
            return
        each = KEY + sum(tensor.nbytes for row in rows for tensor in row.values()) / len(rows)
        samples = batches_per_epoch * len(rows) * Team.present().size
        needed, free = each * samples, self.cache.free()
        if needed > min(self.cache.limit, self.cache.bytes + free):
            warnings.warn(
                f"the teacher cache would take about {needed / 2**30:.2f} GiB ({samples:,} samples of an epoch, "
                f"{each / 2**10:,.1f} KiB each), and cache_limit_gib={self.cache.limit / 2**30:g} with "
                f"{free / 2**30:.1f} GiB free on the disk: for the samples that do not fit the teacher runs in every "
                f"epoch; keep fewer logits (top_k), or raise the limit",
                stacklevel=2,
            )


def _cut(answers: Mapping[str, Tensor], sample: int, lengths: list[int] | None) -> dict[str, Tensor]:
    end = None if lengths is None else lengths[sample]
    return {part: tensor[sample, :end].cpu() for part, tensor in answers.items()}


def _padded(rows: list[Tensor], tokens: int) -> Tensor:
    padded = torch.zeros(len(rows), tokens, *rows[0].shape[1:], dtype=rows[0].dtype, device="cpu")
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = row
    return padded
