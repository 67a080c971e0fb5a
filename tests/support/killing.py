"""A callback that ends its process as a power cut would."""

import os
import signal
from typing import Any

from lightning.pytorch.callbacks import Callback


class KillBefore(Callback):
    """SIGKILL at the start of the batch after optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
