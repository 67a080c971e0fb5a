"""The best weights by a metric, as a ModelCheckpoint of the user stored them: checked early, loaded at the end."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.training.pruned_checkpoints import same_shapes
from lightning_compress.training.saved_files import SavedFiles
from lightning_compress.training.sharding import shards

__all__ = ["check_best", "load_best", "monitored_metric"]


def monitored_metric(trainer: Trainer) -> str | None:
    """The metric of the first ModelCheckpoint that follows one."""
    return next((c.monitor for c in _model_checkpoints(trainer) if c.monitor), None)


def check_best(trainer: Trainer, lifecycle: Lifecycle, saved_files: SavedFiles) -> None:
    """ValueError when the best checkpoint will hold weights without the scales that they were trained with.

    Warns when a resumed run's best checkpoint so far will not be opened at its end.
    """
    bare = [c for c in _model_checkpoints(trainer) if c.monitor and c.save_weights_only]
    for modifier in lifecycle.modifiers if bare else ():
        if modifier.needs.checkpoint_state:
            raise ValueError(
                f"ModelCheckpoint(monitor={bare[0].monitor!r}, save_weights_only=True) stores the best weights without "
                f"the state of {modifier.name}, which they were trained with: leave save_weights_only out, or compress "
                f"the last weights with load_best=False"
            )
    for best in _best_checkpoints(trainer)[:1]:
        if saved_files.will_refuse(best.best_model_path):
            rank_zero_warn(
                f"the best checkpoint so far, {best.best_model_path}, was saved by another process and holds more than "
                f"tensors and plain values, so it will not be opened: unless this run saves a better one, it ends with "
                f"an error before it compresses; to compress the last weights set load_best=False"
            )


def load_best(
    trainer: Trainer, pl_module: LightningModule, lifecycle: Lifecycle, saved_files: SavedFiles, run: str
) -> tuple[str | None, dict[str, Any]]:
    """Load the best weights, but not shards; the path of their checkpoint, and the states of the modifiers in it.

    None and no states when no ModelCheckpoint follows a metric, or its best checkpoint does not fit this run (a warning
    says why). ``run`` is the name of this run.
    """
    monitored = _best_checkpoints(trainer)
    if not monitored:
        return None, {}
    best = monitored[0]
    checkpoint = saved_files.read(best.best_model_path, trainer)
    keys = {c.state_key for c in trainer.callbacks if getattr(c, "lifecycle", None) is lifecycle}
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key in keys]
    if states and states[0].get("run", run) != run:
        rank_zero_warn(
            f"the best checkpoint by {best.monitor!r}, {best.best_model_path}, was overwritten by another run, so that "
            f"the last weights are compressed instead: give each run a folder of its own for its checkpoints"
        )
        return None, {}
    if not shards(trainer) and not same_shapes(checkpoint["state_dict"], pl_module):
        rank_zero_warn(
            f"the best checkpoint by {best.monitor!r}, {best.best_model_path}, was saved before the model had shrunk "
            f"to its present shapes; the last weights are compressed instead: shrink earlier, or set load_best=False"
        )
        return None, {}
    if not shards(trainer):
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    score = "" if best.best_model_score is None else f", {float(best.best_model_score):.6g}"
    rank_zero_info(f"compressing the best weights by {best.monitor!r}{score}, from {best.best_model_path}")
    return best.best_model_path, states[0]["modifiers"] if states else {}


def _best_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """ModelCheckpoints that have stored a best one by a metric."""
    return [c for c in _model_checkpoints(trainer) if c.monitor and c.best_model_path]


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
