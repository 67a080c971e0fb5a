"""One measurement of a Trainer's model: its validation batches, its precision, its ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.calibration.inputs import IN_TRAINER, run_model
from lightning_compress.training.evaluation import Measurement, batches_of, evaluate
from lightning_compress.training.loaders import to_device

__all__ = ["measured", "summing_device"]


def measured(
    trainer: Trainer,
    pl_module: LightningModule,
    module: nn.Module,
    loaders: Sequence[Any],
    limits: Sequence[int | None],
    monitor: str | None,
    progress: Callable[[int], None] = lambda batches: None,
) -> Measurement:
    """The metric on batches of these loaders; every rank calls this and measures its share.

    Args:
        trainer: The Trainer of a fit.
        pl_module: The LightningModule, for its metric.
        module: The model inside it.
        loaders: As :func:`lightning_compress.training.loaders.validation_loaders` gives them, with ``limits``.
        limits: Number of batches of each.
        monitor: The metric to put first.
        progress: Called with the number of measured batches.
    """
    return evaluate(
        pl_module,
        module,
        batches_of(loaders, limits, partial(to_device, trainer, pl_module)),
        forward=partial(run_model, advice=IN_TRAINER),
        context=trainer.precision_plugin.val_step_context,
        monitor=monitor,
        device=summing_device(trainer),
        progress=progress,
    )


def summing_device(trainer: Trainer) -> torch.device:
    """Device on which ranks add up; a single process uses the CPU, since MPS has no float64."""
    return torch.device("cpu") if trainer.world_size == 1 else trainer.strategy.root_device
