"""All events of a run without a Trainer, around a calibration."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_compress.calibration.modes import forked_random_state
from lightning_compress.calibration.sequential import end_training
from lightning_compress.core import Lifecycle, State

__all__ = ["all_events"]


@contextmanager
def all_events(lifecycle: Lifecycle, state: State, seed: int) -> Iterator[None]:
    """INITIALIZE and TRAINING_END, then the calibration inside, then FINALIZE; torch's random state is as before."""
    with forked_random_state():
        torch.manual_seed(seed)
        try:
            lifecycle.initialize(state)
            end_training(lifecycle, state)
            yield
            lifecycle.finalize(state)
        except BaseException:
            lifecycle.abort()
            raise
