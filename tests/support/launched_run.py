"""A run on two ranks that Lightning launches itself, slow enough to be signalled.

python -m tests.support.launched_run FOLDER training|calibration
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from tests.support.preempted_runs import fit
from tests.support.training_runs import RoundingModifier


class Tells(Callback):
    """Writes down its process, and where it is."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        (self.folder / f"rank {trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        time.sleep(0.05)
        if trainer.global_step == 2:
            (self.folder / f"training {trainer.global_rank}").touch()


class Slow(RoundingModifier):
    folder: str = ""
    seconds: float = 0.0

    def on_block_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        Path(self.folder, f"calibration {state.team.rank}").touch()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.05)


if __name__ == "__main__":
    folder, phase = Path(sys.argv[1]), sys.argv[2]
    epochs, seconds = (1000, 0.0) if phase == "training" else (1, 3.0)
    modifier = Slow(folder=str(folder), seconds=seconds)
    fit(folder, Tells(folder), modifier=modifier, strategy="ddp", devices=2, max_epochs=epochs)
