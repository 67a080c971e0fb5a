"""Runs that are resumed: within an epoch, after the last batch of one, and after their end.

Lightning does not load the states of loaders that were made before the checkpoint was restored: any use of
``trainer.estimated_stepping_batches`` in ``configure_optimizers`` does that. loader_states.py stores and loads them.

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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.resume.folder_log import remove as remove_log
from lightning_compress.training import loader_states
from lightning_compress.training.gate import judged_again, raise_failures
from lightning_compress.training.random_state import LoadedRandomState
from lightning_compress.training.run import Run
from lightning_compress.training.saved_files import plain_file
from lightning_compress.training.sharding import shards

__all__ = ["go_on", "is_resumed", "load_earlier_end"]


def go_on(trainer: Trainer, random: LoadedRandomState, states: list[dict[str, Any]]) -> int:
    """Let the loaders and the random state go on where they stopped; called in on_train_start.

    ``states`` are those of the loaders of each rank. Returns how many batches of the resumed epoch come again, since a
    loader has no state (a warning says so).
    """
    over = _after_last_batch(trainer)
    validation = trainer.fit_loop.epoch_loop.val_loop
    begins = over and not validation.restarted_mid_evaluation  # an epoch begins right now
    if states:
        loader_states.load(trainer, states, begun=not begins)
    else:
        _load_left_out(trainer)
    trainer.fit_loop._combined_loader_states_to_load = []
    if validation.restarted_mid_evaluation:
        random.restore()
        count = validation.batch_progress.total
        count.ready = count.started = count.completed  # it begins with its first batch
    elif begins:
        _begin_epoch(trainer, random, loaded=bool(states))
    elif _all_have_states(trainer):
        random.restore()  # before the next batch is read; other loaders draw the order of their new epoch first
    return 0 if over or _all_have_states(trainer) else _repeated(trainer)


def _load_left_out(trainer: Trainer) -> None:
    """Load the states of a checkpoint without those of all ranks, where Lightning has left them out."""
    loop = trainer.fit_loop
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        if loop._data_fetcher is not None:
            iter(loop._data_fetcher)  # the present iterator began without the state


def _repeated(trainer: Trainer) -> int:
    """How many batches come again, with a warning that says why."""
    loop = trainer.fit_loop
    repeated = int(loop.epoch_loop.batch_progress.current.ready)
    if repeated and not all(loader_states.order_is_stored(loader) for loader in loop._combined_loader.flattened):
        rank_zero_warn(
            f"this run is resumed after batch {repeated} of an epoch, and its training loader shuffles by a random "
            f"sampler that Lightning distributes, whose order is in no state: what is left of the epoch is drawn anew, "
            f"and up to {repeated} batches come again; give the loader sampler=DistributedSampler(dataset)"
        )
    elif repeated:
        rank_zero_warn(
            f"this run is resumed after batch {repeated} of an epoch, and its training loader has no state: it "
            f"begins the epoch again, so that {repeated} batches come again and as many at the end are left "
            f"out; resume from the end of an epoch, or use a loader with a state, such as "
            f"torchdata's StatefulDataLoader"
        )
    return repeated


def _all_have_states(trainer: Trainer) -> bool:
    loaders = trainer.fit_loop._combined_loader
    return loaders is None or all(loader_states.has_state(loader) for loader in loaders.flattened)


def _after_last_batch(trainer: Trainer) -> bool:
    """Whether the checkpoint that is resumed was saved after the last batch of an epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _begin_epoch(trainer: Trainer, random: LoadedRandomState, loaded: bool) -> None:
    """Let the next epoch, if there is one, begin as any other; its loader draws its order from now on."""
    loop, fetcher, states = trainer.fit_loop, trainer.fit_loop._data_fetcher, random.states
    random.restore()
    if loop.done:
        return
    if loop.restarted_mid_epoch:
        loop.reset_restart_stage()
    if fetcher is None:
        return
    iter(fetcher)  # Lightning has made an iterator before anything was restored
    if loaded and (fetcher.length is not None or fetcher.done):  # that iterator is at the end of the epoch that is over
        random.states = states
        random.restore()
        iter(fetcher)


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
    remove_log(outputs.log)  # killed when the export was complete
    checkpoint = _read(path)
    pl_module.on_load_checkpoint(checkpoint)
    if shards(trainer):
        trainer.strategy.load_checkpoint(path, weights_only=True)
    else:
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
        trainer.checkpoint_callback.best_model_path = str(path)
    earlier: dict[str, Any] = checkpoint["callbacks"][key]
    judged = earlier.get("facts", {}).get("gate", ())
    raise_failures(judged_again(run.options.gates, judged), str(path.parent))
    if any(not entry["held"] for entry in judged):
        rank_zero_info("the gate holds by its present limits; report and manifest tell of the earlier ones")
    rank_zero_info(
        f"this run was compressed and exported before, into {outputs.export}: the model is now that of {path}, and "
        f"nothing is exported again (delete that file to compress and export again)"
    )
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
