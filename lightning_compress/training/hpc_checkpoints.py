"""What a run that a signal has ended goes on from: ``hpc_ckpt_N.ckpt``, which Lightning finds by that name.

The last two are kept. Once the model is compressed, its checkpoint takes the place of the last one: under Slurm,
Lightning loads that one wherever no ``ckpt_path`` is given, in ``trainer.test`` too, and a job that is requeued during
the test finds its work done.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_compress.team import Team
from lightning_compress.training import random_state

__all__ = ["HpcCheckpoints"]


@dataclass(frozen=True)
class HpcCheckpoints:
    """The checkpoints in ``default_root_dir`` of a Trainer; every rank calls each method.

    Args:
        trainer: The Trainer.
        team: Its processes.
    """

    trainer: Trainer
    team: Team

    @property
    def folder(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def save(self) -> Path:
        """Save the next one, and remove all but the last two."""
        last = self.team.result(lambda: _last(self.folder), "looking for checkpoints")
        path = self.folder / f"hpc_ckpt_{last + 1}.ckpt"
        self.trainer.save_checkpoint(path, weights_only=False)
        for old in self.folder.glob("hpc_ckpt_*.ckpt") if self.trainer.is_global_zero else ():
            if (number := _number(old)) and number < last:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        return path

    def supersede(self, compressed: Path) -> None:
        """The last one, if any, becomes the same file as ``compressed``."""
        if self.trainer.is_global_zero and (number := _last(self.folder)):
            link = self.folder / "superseding.ckpt"  # has no N
            last = self.folder / f"hpc_ckpt_{number}.ckpt"
            if compressed.is_dir():  # of a sharded model
                shutil.rmtree(link, ignore_errors=True)
                shutil.copytree(compressed, link)
                shutil.rmtree(last)
            else:
                link.unlink(missing_ok=True)
                try:
                    os.link(compressed, link)
                except OSError:  # not on this file system
                    shutil.copyfile(compressed, link)
            os.replace(link, last)
        self.trainer.strategy.barrier("the compressed checkpoint")

    def can_repeat_validation(self) -> bool:
        """Whether a resumed run can begin this validation again: not where it would have no training left to do."""
        trainer = self.trainer
        training = trainer.state.fn == "fit" and trainer.validating
        return training and (trainer.max_steps == -1 or trainer.global_step < trainer.max_steps)

    def repeat_validation(self, random_before: dict[str, Any] | None) -> None:
        """Let the next one say that the validation that runs now is at its first batch.

        Args:
            random_before: The random state before the validation, which becomes the present one.
        """
        progress = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress
        before = progress.total.completed - progress.current.completed
        for counts, number in ((progress.total, before), (progress.current, 0)):
            counts.ready = counts.started = number + 1
            counts.processed = counts.completed = number
        if random_before is not None:
            random_state.restore_own(random_before)


def _last(folder: Path) -> int:
    """The highest N; 0 when there is none."""
    return max(map(_number, folder.glob("hpc_ckpt_*.ckpt")), default=0)


def _number(path: Path) -> int:
    match = re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name)
    return int(match[1]) if match else 0
