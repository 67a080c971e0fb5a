"""Runs that are resumed: within an epoch, after the last batch of one, and after their end.

Lightning stores the states of loaders that have one, and does not load them where the loaders were made before the
checkpoint was restored: any use of ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` does that.

A checkpoint that was saved at the end of an epoch's last batch (``every_n_train_steps``) resumes at the next epoch.
Lightning does not count that one as begun: its ``on_train_epoch_start`` never comes, and a run that resumes once more,
from a checkpoint inside it, trains the epoch from its first batch again.

The results of a run that has ended are used, not computed again. ``last.ckpt`` holds the trained, dense model also
after ``compressed.ckpt`` was written. Both hold the name of their run and its clock, which shows whether
``compressed.ckpt`` was made from that very model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.training.random_state import LoadedRandomState
from lightning_compress.training.run import Run
from lightning_compress.training.saved_files import plain_file
from lightning_compress.training.sharding import shards

__all__ = ["go_on", "is_resumed", "load_earlier_end"]


def go_on(trainer: Trainer, random: LoadedRandomState) -> int:
    """Let the loaders and the random state go on where they stopped; called in on_train_start.

    Returns how many batches of the resumed epoch come again, since a loader has no state (a warning says so).
    """
    repeated = _resume_loaders(trainer)
    validation = trainer.fit_loop.epoch_loop.val_loop
    if validation.restarted_mid_evaluation:
        random.restore()
        count = validation.batch_progress.total
        count.ready = count.started = count.completed  # it begins with its first batch
    elif _after_last_batch(trainer):
        random.restore()
        _begin_epoch(trainer)
    return repeated


def _resume_loaders(trainer: Trainer) -> int:
    """Load the states of loaders that Lightning has left out.

    Returns how many batches of the resumed epoch come again.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        if loop._data_fetcher is not None:
            iter(loop._data_fetcher)  # the present iterator began without the state
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if _after_last_batch(trainer) or all(isinstance(loader, _Stateful) for loader in loaders):
        return 0
    if repeated := int(loop.epoch_loop.batch_progress.current.ready):
        rank_zero_warn(
            f"this run is resumed after batch {repeated} of an epoch, and its training loader has no state: it "
            f"begins the epoch again, so that {repeated} batches come again and as many at the end are left "
            f"out; resume from the end of an epoch, or use a loader with a state, such as "
            f"torchdata's StatefulDataLoader"
        )
    return repeated


def _after_last_batch(trainer: Trainer) -> bool:
    """Whether the checkpoint that is resumed was saved after the last batch of an epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _begin_epoch(trainer: Trainer) -> None:
    """Let the next epoch, if there is one, begin as any other; its loader draws its order from now on."""
    loop = trainer.fit_loop
    if loop.done:
        return
    if loop.restarted_mid_epoch:
        loop.reset_restart_stage()
    if (fetcher := loop._data_fetcher) is not None:
        iter(fetcher)  # Lightning has made an iterator before anything was restored


def is_resumed(trainer: Trainer) -> bool:
    """Whether the user resumed this run; Lightning's tuner resumes too, from a checkpoint that it has just written."""
    path = trainer.ckpt_path
    return path is not None and not Path(path).name.startswith((".lr_find", ".scale_batch_size"))


def load_earlier_end(
    trainer: Trainer, pl_module: LightningModule, run: Run, key: str, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Load ``compressed.ckpt`` if this very run has written it from this very model; every rank calls this.

    ``state`` is the callback's present state, ``key`` its key in a checkpoint. Returns the callback's state in that
    checkpoint; None when there is no such checkpoint.
    """
    outputs = run.outputs
    if outputs is None:
        return None
    path = outputs.checkpoint
    if not run.team.result(lambda: _made_from(_read(path), outputs.export, key, state), "reading compressed.ckpt"):
        return None
    checkpoint = _read(path)
    pl_module.on_load_checkpoint(checkpoint)
    if shards(trainer):
        trainer.strategy.load_checkpoint(path, weights_only=True)
    else:
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
        trainer.checkpoint_callback.best_model_path = str(path)
    rank_zero_info(
        f"this run was compressed and exported before, into {outputs.export}: the model is now that of {path}, and "
        f"nothing is exported again (delete that file to compress and export again)"
    )
    earlier: dict[str, Any] = checkpoint["callbacks"][key]
    return earlier


def _made_from(checkpoint: Mapping[str, Any], folder: Path, key: str, state: Mapping[str, Any]) -> bool:
    earlier = checkpoint.get("callbacks", {}).get(key, {})
    same = all(earlier.get(name) == state[name] for name in ("run", "clock", "recipe"))
    exported = all(origin_of(folder).get(name) == state[name] for name in ("run", "clock"))
    return bool(earlier) and earlier["done"] and same and exported


def _read(path: Path) -> dict[str, Any]:
    """The content; empty when the file is missing, incomplete (killed while it was written), or holds objects."""
    try:
        checkpoint: dict[str, Any] = torch.load(plain_file(path), map_location="cpu", weights_only=True)
    except Exception:
        return {}
    return checkpoint
