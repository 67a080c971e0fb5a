"""Resuming within an epoch, and after the last batch of one, where Lightning 2.6 needs help.

Lightning stores the states of loaders that have one, and does not load them where the loaders were made before the
checkpoint was restored: any use of ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` does that.

A checkpoint that was saved at the end of an epoch's last batch (``every_n_train_steps``) resumes at the next epoch.
Lightning does not count that one as begun: its ``on_train_epoch_start`` never comes, and a run that resumes once more,
from a checkpoint inside it, trains the epoch from its first batch again.
"""

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["after_last_batch", "begin_epoch", "resume_loaders"]


def resume_loaders(trainer: Trainer) -> int:
    """Load the states of loaders that Lightning has left out; called in on_train_start.

    Returns:
        How many batches of the resumed epoch come again, since a loader has no state (a warning says so).
    """
    loop = trainer.fit_loop
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        if loop._data_fetcher is not None:
            iter(loop._data_fetcher)  # the present iterator began without the state
    if repeated := _repeated_batches(trainer):
        rank_zero_warn(
            f"this run is resumed after batch {repeated} of an epoch, and its training loader has no state: it "
            f"begins the epoch again, so that {repeated} batches come again and as many at the end are left "
            f"out; resume from the end of an epoch, or use a loader with a state, such as "
            f"torchdata's StatefulDataLoader"
        )
    return repeated


def _repeated_batches(trainer: Trainer) -> int:
    loop = trainer.fit_loop
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if after_last_batch(trainer) or all(isinstance(loader, _Stateful) for loader in loaders):
        return 0
    return int(loop.epoch_loop.batch_progress.current.ready)


def after_last_batch(trainer: Trainer) -> bool:
    """Whether the checkpoint that is resumed was saved after the last batch of an epoch; called in on_train_start."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def begin_epoch(trainer: Trainer) -> None:
    """Let the next epoch, if there is one, begin as any other; its loader draws its order from now on."""
    loop = trainer.fit_loop
    if loop.done:
        return
    if loop.restarted_mid_epoch:
        loop.reset_restart_stage()
    if (fetcher := loop._data_fetcher) is not None:
        iter(fetcher)  # Lightning has made an iterator before anything was restored
