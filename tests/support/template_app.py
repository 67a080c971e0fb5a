"""An app as the lightning-hydra-template lays them out: the network is a hyperparameter of the LightningModule.

Nothing here may import lightning_compress: tests load checkpoints of this app where that package cannot be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

SIDE, CLASSES = 8, 10
ADAM = partial(torch.optim.Adam, lr=5e-3)


class DenseNet(nn.Module):
    """Pixels to logits, by way of two hidden layers with BatchNorm."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(SIDE * SIDE, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))


class DigitsModule(LightningModule):
    """Classifies images with ``net``."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., Optimizer] = ADAM,
        scheduler: Callable[..., Any] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc, self.test_acc = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)
        self.val_acc_best = MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        return self.criterion(logits, y), logits.argmax(1), y

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc_best.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _, _ = self.model_step(batch)
        self.train_loss(loss)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, answers, y = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(answers, y)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        _, answers, y = self.model_step(batch)
        self.test_acc(answers, y)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True)

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


class DigitsData(LightningDataModule):
    """Images [1, 8, 8] of ten classes: one pattern for each class, with noise."""

    def __init__(self, split: tuple[int, int, int] = (96, 32, 32), batch_size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.parts: list[Any] = []

    def setup(self, stage: str | None = None) -> None:
        if not self.parts:
            generator = torch.Generator().manual_seed(42)
            total = sum(self.hparams.split)
            patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
            y = torch.arange(total) % CLASSES
            x = patterns[y] + 0.3 * torch.randn(total, 1, SIDE, SIDE, generator=generator)
            self.parts = random_split(TensorDataset(x, y), self.hparams.split, generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[0], self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[1], self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[2], self.hparams.batch_size)
