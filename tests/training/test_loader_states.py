"""Resuming within an epoch: every rank trains each batch once, and the run ends with the bits of an unbroken one."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from examples.token_blocks import Draws
from lightning_compress import CompressionCallback
from lightning_compress.training.loader_states import order_is_stored
from tests.support.loader_runs import EPOCHS, LOADERS, run
from tests.support.training_runs import Regression, RoundingModifier, StopAfter, Sums, quiet

QUICK = {("small_noisy", 1), ("small_stream_noisy", 1), ("small_stream", 2), ("map_noisy", 1), ("map_persistent", 1)}
QUICK |= {("stream_workers", 2), ("shares", 2)}
needs_torchdata = pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="needs torchdata")


def cases():
    for kind in LOADERS:
        for ranks in (1, 2):
            if (kind.startswith("map") and ranks == 2) or (kind.startswith("shares") and ranks == 1):
                continue  # one process needs no DistributedSampler, and two do
            marks = [] if (kind, ranks) in QUICK else [pytest.mark.slow]
            yield pytest.param(kind, ranks, marks=marks if kind.startswith("small") else [*marks, needs_torchdata])


@pytest.mark.parametrize(("kind", "ranks"), list(cases()))
def test_a_run_that_is_resumed_within_an_epoch_ends_with_the_same_bits(tmp_path: Path, kind: str, ranks: int) -> None:
    """Ended in the first epoch, at its end, and in the second one, and resumed each time with another random seed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(kind, ranks, whole)
    epoch = len(trained(whole, 0)) // EPOCHS
    for step in (epoch // 2, epoch, epoch + 1):
        run(kind, ranks, broken, end_before=step)
        assert not (broken / "compressed").exists()
    run(kind, ranks, broken)
    for rank in range(ranks):
        assert trained(broken, rank) == trained(whole, rank)
    if ranks == 2 and kind != "shares_noisy":
        assert trained(whole, 0) != trained(whole, 1)
    files = [(folder / "compressed" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert files[0] == files[1]


def trained(folder: Path, rank: int) -> list[str]:
    return (folder / f"trained{rank}.txt").read_text().splitlines()


class Unnamed:
    """A batch that no checkpoint can hold."""

    def __init__(self, rows):
        self.rows = rows

    def to(self, device):
        return self


class Objects(IterableDataset):
    """A loader with a state and without a length."""

    given = 0

    def __iter__(self):
        for place in range(self.given, 4):
            self.given = place + 1
            yield Unnamed(torch.ones(2, 8))

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class OnObjects(Regression):
    def training_step(self, batch, batch_idx):
        return self.model(batch.rows).square().mean()


def resumed(folder, module, loader, ranks=1):
    """Warnings of a run that is resumed after its second batch."""

    def fit(*callbacks, **options):
        kept = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=1)
        callback = CompressionCallback(RoundingModifier(data=False), evaluate=False)
        quiet(folder, kept, callback, *callbacks, limit_val_batches=0).fit(module(), loader(), **options)

    with pytest.raises(KeyError, match="power cut"):
        fit(StopAfter(3))
    path = folder / "kept" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["CompressionCallback"]
    state["loaders"] = state["loaders"] * ranks
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ckpt_path=path)
    return [str(warning.message) for warning in caught]


def test_a_batch_that_was_fetched_ahead_and_cannot_be_stored_is_named(tmp_path):
    told = resumed(tmp_path, OnObjects, Objects)
    assert any("one batch of this epoch is left out: it was fetched when the checkpoint was saved" in m for m in told)


def test_the_order_of_a_random_sampler_that_lightning_distributes_is_not_stored():
    rows = Sums().rows
    sampler = DistributedSamplerWrapper(RandomSampler(rows), num_replicas=2, rank=0)
    assert not order_is_stored(DataLoader(rows, 4, sampler=sampler))
    sampler = DistributedSamplerWrapper(Draws(16, 16), num_replicas=2, rank=0)
    assert order_is_stored(DataLoader(rows, 4, sampler=sampler))
    assert order_is_stored(DataLoader(rows, 4, sampler=DistributedSampler(rows, num_replicas=2, rank=0)))
    assert order_is_stored(DataLoader(rows, 4, shuffle=True))


def test_a_run_with_another_number_of_processes_is_told(tmp_path):
    class Counting(DataLoader):
        state_dict = lambda self: {}  # noqa: E731
        load_state_dict = lambda self, state: None  # noqa: E731

    told = resumed(tmp_path, Regression, lambda: Counting(Sums().rows, 4), ranks=2)
    assert any("holds the states of the loaders of 2 processes, and this run has 1" in m for m in told)
