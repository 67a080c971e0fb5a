"""What the tests of training share: a modifier that writes down its events, small LightningModules, a quiet Trainer."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pydantic import PrivateAttr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionCallback
from lightning_compress.core import Event, Modifier, Needs, State


class RecordingModifier(Modifier):
    """``events``: (event type, global_step, global_batch); ``calls``: handlers in order."""

    _events: list[tuple[str, int, int]] = PrivateAttr(default_factory=list)
    _calls: list[str] = PrivateAttr(default_factory=list)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._calls.append("initialize")
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        self._events.append((event.type_.name, event.global_step, event.global_batch))

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._calls.append(f"start at {event.global_step}")

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._calls.append(f"end at {event.global_step}")

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._calls.append("finalize")
        return True

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self._events]

    @property
    def batches(self) -> list[str]:
        """The events of each batch as one word: S tart, L oss, p re-step, P ost-step, E nd."""
        names = ["BATCH_START", "LOSS_CALCULATED", "OPTIM_PRE_STEP", "OPTIM_POST_STEP", "BATCH_END"]
        word = "".join("SLpPE"[names.index(name)] for name in self.names if name in names)
        return [f"S{rest}" for rest in word.split("S")[1:]]


class RoundingModifier(Modifier):
    """A stand-in for compression: at calibration end every Linear's weight becomes 0 or 1."""

    data: bool = True
    _seen: list[torch.Tensor] = PrivateAttr(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(calibration=True, data=self.data)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def linears(self, state: State) -> list[nn.Linear]:
        return [m for m in state.model.modules() if isinstance(m, nn.Linear)]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.data:
            self.hook(self.linears(state)[0], lambda module, args: self._seen.append(args[0].clone()))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        for linear in self.linears(state):
            linear.weight.data = (linear.weight > 0).to(linear.weight.dtype)
            state.ledger.add("model", "rounding", params=linear.weight.numel())


class Regression(LightningModule):
    """A small network that learns a sum, and logs what it validates on."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = optimizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def error(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.error(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/mse", self.error(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/mse", self.error(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.05)

    def is_rounded(self) -> bool:
        return all(set(m.weight.unique().tolist()) <= {0.0, 1.0} for m in self.modules() if isinstance(m, nn.Linear))


class Sums(LightningDataModule):
    """Rows of 8 numbers, and their sums; the first number of a training row is its index."""

    def __init__(self, batches: int = 4, batch_size: int = 4, shuffle: bool = True):
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle
        x = torch.randn(batches * batch_size, 8, generator=torch.Generator().manual_seed(0))
        x[:, 0] = torch.arange(len(x))
        self.rows = TensorDataset(x, 0.1 * x[:, 1:].sum(1, keepdim=True))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size)

    test_dataloader = val_dataloader


def quiet(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A Trainer that says nothing and writes into ``folder``."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    chosen = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "callbacks": list(callbacks)}
    return Trainer(**{**silent, **chosen, **options})


def rounding(data: bool = True, **options: Any) -> CompressionCallback:
    """A callback that rounds; with ``data=False`` it needs none."""
    return CompressionCallback(RoundingModifier(data=data), **options)


def best(folder: Path) -> ModelCheckpoint:
    """Follows the metric of :class:`Regression`."""
    return ModelCheckpoint(folder / "checkpoints", monitor="val/mse")


class StopAfter(Callback):
    """What a power cut does."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.batches:
            raise KeyError("power cut")
