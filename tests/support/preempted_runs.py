"""Runs that signals end at a chosen moment: what they train on, and what they leave behind."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet


class ResumableLoader(DataLoader[Any]):
    """Its state is the number of batches of the present epoch; the order of an epoch depends on its number alone."""

    given = first = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        return self._from(first)

    def _from(self, first: int) -> Iterator[Any]:
        for place, indices in enumerate(self.batch_sampler):
            if place >= first:
                self.given = place + 1
                yield self.collate_fn([self.dataset[i] for i in indices])

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"] % len(self)


class ResumableSums(LightningDataModule):
    """The rows of :class:`Sums` in a loader with a state; two loaders for validation."""

    def __init__(self, batches: int = 5):
        super().__init__()
        self.rows = Sums(batches).rows

    def train_dataloader(self) -> DataLoader[Any]:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: Any = DistributedSampler(self.rows, ranks, rank, shuffle=True)
        return ResumableLoader(self.rows, 4 // ranks, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.rows, 8), DataLoader(self.rows, 4)]

    test_dataloader = val_dataloader


class Recorded(Regression):
    """Dropout, so that the random state counts; what it trains and validates on is written down in its checkpoints."""

    def __init__(self) -> None:
        super().__init__(torch.optim.Adam)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.history: list[str] = []
        self.register_buffer("average", torch.zeros(8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.history.append(f"{batch_idx}: rows {sorted(batch[0][:, 0].int().tolist())}")
        return self.error(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.lerp_(self.model[0].weight.detach(), 0.1)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        error = self.error(batch) + torch.rand(())
        if dataloader_idx == 0:
            self.log("val/mse", error, add_dataloader_idx=False, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.error(batch)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.history.append("validated")

    def on_train_epoch_start(self) -> None:
        self.history.append(f"epoch {self.current_epoch}")

    def on_train_epoch_end(self) -> None:
        self.history.append("end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = list(self.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history[:] = checkpoint["history"]


class Signals(Callback):
    """Sends itself a signal when a hook comes for the so-manieth time: ``{"on_train_batch_end": [3, 7]}``."""

    def __init__(self, number: int, moments: dict[str, list[int]], rank: int = 0):
        self.number, self.moments, self.rank = number, moments, rank
        self.counts = dict.fromkeys(moments, 0)
        for hook in moments:
            setattr(self, hook, lambda trainer, *_args, _hook=hook, **_: self.count(trainer, _hook))

    def count(self, trainer: Trainer, hook: str) -> None:
        if trainer.sanity_checking:
            return
        self.counts[hook] += 1
        if trainer.global_rank == self.rank and self.counts[hook] in self.moments[hook]:
            signal.raise_signal(self.number)


def fit(
    folder: Path, *callbacks: Callback, modifier: Any = None, module: Callable[[], Recorded] = Recorded, **options: Any
) -> Recorded:
    """One attempt of a run; under Slurm it goes on from the last ``hpc_ckpt_N.ckpt``."""
    torch.manual_seed(0)
    model = module()
    keeping = ModelCheckpoint(folder / "kept", monitor="val/mse", save_last=True, enable_version_counter=False)
    compression = CompressionCallback(modifier or RoundingModifier(), allow_recipe_change=True)
    trainer = quiet(folder, compression, keeping, *callbacks, **{"max_epochs": 3} | options)
    trainer.fit(model, ResumableSums())
    return model


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on signals: weights, optimizer, history, the choice of the best checkpoint, the export."""
    saved = torch.load(folder / "compressed.ckpt", weights_only=True)
    return {
        "weights": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "history": saved["history"],
        "clock": saved["callbacks"]["CompressionCallback"]["clock"],
        "best": [path.name for path in sorted((folder / "kept").iterdir())],
        "export": (folder / "compressed" / "model.safetensors").read_bytes(),
    }


def attempts(attempt: Callable[[int], None], most: int = 20) -> list[Any]:
    """Attempts, counted from 0, until one ends without a signal; the exit codes of the others."""
    codes = []
    for number in range(most):
        try:
            attempt(number)
            return codes
        except SystemExit as stopped:
            codes.append(stopped.code)
    raise AssertionError(f"{most} attempts have not been enough: {codes}")
