"""Resuming after the last batch of an epoch, where Lightning 2.6 needs help.

A checkpoint that was saved at the end of an epoch's last batch (``every_n_train_steps``) resumes at the next epoch.
Lightning does not count that one as begun: its ``on_train_epoch_start`` never comes, and whoever resumes once more,
from a checkpoint inside it, trains the epoch from its first batch again.
"""

from lightning.pytorch import Trainer

__all__ = ["after_last_batch", "begin_epoch"]


def after_last_batch(trainer: Trainer) -> bool:
    """Whether the checkpoint that is resumed was saved after the last batch of an epoch; asked in on_train_start."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def begin_epoch(trainer: Trainer) -> None:
    """Let the next epoch, if there is one, begin as any other; its loader draws (its order) from now on."""
    loop = trainer.fit_loop
    if loop.done:
        return
    if loop.restarted_mid_epoch:
        loop.reset_restart_stage()
    if (fetcher := loop._data_fetcher) is not None:
        iter(fetcher)                          # Lightning has made an iterator already, before anything was restored
