"""Modifiers see the loss itself: in fp16 it reaches Lightning's hook multiplied by the scale of its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["unscaled"]


@contextmanager
def unscaled(trainer: Trainer, loss: Tensor) -> Iterator[None]:
    """Inside, ``loss`` is unscaled, in place; afterwards it is scaled again, with all that was added to it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else 1.0
    if scale != 1.0:
        loss.div_(scale)
    yield
    if scale != 1.0:
        loss.mul_(scale)
