"""Runs over training loaders with a state, which end without a word at a step and go on from the last checkpoint.

Rows of tensors; in ``noisy`` sets each sample draws random numbers, as augmentation does. A stream has no length, and
differs between ranks and workers.
"""

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

import lightning_compress as lc
from lightning_compress import CompressionCallback
from lightning_compress.modifiers.gptq import modifier as _gptq  # noqa: F401  (imported before forking)
from tests.support.training_runs import Regression, quiet
from tests.support.two_ranks import run_two_ranks

ROWS, BATCH, EPOCHS = 32, 4, 2


def own_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


class Rows(Dataset[Any]):
    def __init__(self, noisy: bool = False):
        self.x, self.noisy = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(3)), noisy

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        return x + torch.randn(8) if self.noisy else x, x[:1]


class Stream(IterableDataset[Any]):
    """All rows, in another order for each epoch and rank; a worker reads every other one."""

    def __init__(self, noisy: bool = False):
        self.rows, self.place, self.epoch, self.rank, self.goes_on = Rows(noisy), 0, -1, own_rank(), False

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if not self.goes_on:
            self.place, self.epoch = 0, self.epoch + 1
        self.goes_on = False
        generator = torch.Generator().manual_seed(10 * self.epoch + self.rank)
        order = torch.randperm(ROWS, generator=generator)[first::step].tolist()
        while self.place < len(order):
            self.place += 1
            yield self.rows[order[self.place - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place, "epoch": self.epoch, "rank": self.rank}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place, self.epoch, self.rank, self.goes_on = state["place"], state["epoch"], state["rank"], True


class Small(DataLoader[Any]):
    """The least that a loader with a state needs; every rank has an order of its own."""

    given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, place = divmod(self.given, len(self))
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(10 * epoch + own_rank()))
        for indices in order.view(-1, BATCH)[place:].tolist():
            self.given += 1
            yield self.collate_fn([self.dataset[index] for index in indices])

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class SmallStream(Stream):
    """A stream that batches by itself: a loader without a length, and without torchdata."""

    def __iter__(self) -> Iterator[Any]:
        rows = super().__iter__()
        for row in rows:
            batch = [row, *(next(rows) for _ in range(BATCH - 1))]
            yield [torch.stack(column) for column in zip(*batch, strict=True)]


def torchdata(data: Dataset[Any], **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset=data, batch_size=BATCH, **options)


def distributed(data: Dataset[Any], **options: Any) -> Any:
    return torchdata(data, sampler=DistributedSampler(data), **options)  # type: ignore[arg-type]


PERSISTENT = {"num_workers": 2, "persistent_workers": True}
LOADERS: dict[str, Callable[[], Any]] = {
    "small": lambda: Small(Rows(), BATCH),
    "small_noisy": lambda: Small(Rows(noisy=True), BATCH),
    "small_stream": lambda: SmallStream(),
    "small_stream_noisy": lambda: SmallStream(noisy=True),
    "map": lambda: torchdata(Rows(), shuffle=True),
    "map_noisy": lambda: torchdata(Rows(noisy=True), shuffle=True),
    "map_workers": lambda: torchdata(Rows(), shuffle=True, num_workers=2),
    "map_persistent": lambda: torchdata(Rows(), shuffle=True, **PERSISTENT),
    "shares": lambda: distributed(Rows()),
    "shares_noisy": lambda: distributed(Rows(noisy=True)),
    "shares_workers": lambda: distributed(Rows(), num_workers=2),
    "shares_persistent": lambda: distributed(Rows(), **PERSISTENT),
    "stream": lambda: torchdata(Stream()),
    "stream_noisy": lambda: torchdata(Stream(noisy=True)),
    "stream_workers": lambda: torchdata(Stream(), num_workers=2),
    "stream_persistent": lambda: torchdata(Stream(), **PERSISTENT),
}


class Noisy(Regression):
    """Dropout, so that the random state counts; writes down what it trains on."""

    def __init__(self) -> None:
        super().__init__(torch.optim.AdamW)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        trainer = self.trainer
        with Path(trainer.default_root_dir, f"trained{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step} {batch[0].sum().item()}\n")
        return self.error(batch)


class Data(LightningDataModule):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return LOADERS[self.kind]()

    def calibration_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), BATCH)


class EndBefore(Callback):
    """The process ends without a word before the batch after this step, as by kill -9."""

    def __init__(self, step: int | None):
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os._exit(0)


def train(kind: str, ranks: int, folder: Path, end_before: int | None) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(os.getpid() if (folder / "kept").exists() else 7)
    kept = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=1)
    modifier = lc.GPTQModifier(scheme="W4A16", group_size=8)
    callback = CompressionCallback(modifier, calibration_batches=2, verify=False, evaluate=False, load_best=False)
    options = {"strategy": "ddp", "devices": 2} if ranks == 2 else {}
    options |= {"max_epochs": EPOCHS, "limit_val_batches": 0}
    quiet(folder, EndBefore(end_before), callback, kept, **options).fit(Noisy(), Data(kind), ckpt_path="last")


def run(kind: str, ranks: int, folder: Path, end_before: int | None = None) -> None:
    """One attempt in processes of its own; AssertionError with the traceback where it fails."""
    folder.mkdir(exist_ok=True)
    if ranks == 2:
        failed = run_two_ranks(lambda rank: train(kind, ranks, folder, end_before), folder, seconds=60)
        assert failed == ["", ""], failed
        return
    if child := os.fork():
        os.waitpid(child, 0)
        failure = folder / "failed.txt"
        assert not failure.exists(), failure.read_text()
        return
    try:
        train(kind, ranks, folder, end_before)
    except BaseException:
        (folder / "failed.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)
