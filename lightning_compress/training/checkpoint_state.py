"""Checkpoints with the callback's state: what is added when one is saved, and checks when another process reads it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.quant.record import Quantized
from lightning_compress.recipe import recipe_difference
from lightning_compress.training import loader_states, random_state
from lightning_compress.training.hyperparameters import write_plain_modules
from lightning_compress.training.pruned_checkpoints import write_shapes

__all__ = ["check_same_recipe", "complete", "readable", "warn_of_missing_parts"]


def complete(
    checkpoint: dict[str, Any], key: str, trainer: Trainer, model: nn.Module | None, *, compressed: bool
) -> None:
    """Add the states of all ranks, and undo weight averaging where the model is compressed; in place.

    Averaging puts the average of dense weights into every checkpoint, compressed.ckpt too.
    """
    state = checkpoint["callbacks"][key]
    state["random"] = random_state.collect_all(state["random"][0])
    state["loaders"] = [] if compressed else loader_states.collect_all(trainer)
    if model is not None:
        write_shapes(checkpoint, model)  # after teardown, the module's own hook is off
    write_plain_modules(checkpoint)
    if compressed and checkpoint.pop("averaging_state", None) is not None:
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")


@contextmanager
def readable() -> Iterator[None]:
    """ValueError instead of the errors that a damaged state, or that of another version, causes inside."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint holds a state of CompressionCallback that cannot be read "
            f"({type(error).__name__}: {error}): it is damaged, or another version of lightning-compress wrote it; "
            f"resume with that version, or load the weights alone and train from step 0"
        ) from error


def check_same_recipe(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """ValueError lists the differences between the recipe of a checkpoint and that of this run."""
    if changes := recipe_difference(saved, present):
        raise ValueError(
            "the recipe differs from that of the checkpoint:\n  " + "\n  ".join(changes) + "\n"
            "resume with the recipe of the first run, or set allow_recipe_change=True"
        )


def warn_of_missing_parts(lifecycle: Lifecycle, state: Mapping[str, Any], pl_module: LightningModule) -> None:
    """Name what a model lacks that gets its weights in a new process, to be validated or tested."""
    if not state["done"]:
        states = zip(lifecycle.modifiers, map(state["modifiers"].get, lifecycle.keys()), strict=True)
        started = [m.name for m, saved in states if m.needs.checkpoint_state and saved and saved["started"]]
        if started:
            rank_zero_warn(
                f"this checkpoint is of a run that has not compressed its model yet: what runs now are its dense "
                f"weights, without what {' and '.join(started)} makes of them; resume the run with trainer.fit, or "
                f"take its compressed.ckpt"
            )
    missing = state.get("facts", {}).get("beside_weights", ())
    if missing and not Quantized.find(pl_module):
        rank_zero_warn(
            f"this checkpoint holds the compressed weights, but not {', nor '.join(missing)}: the model runs without; "
            f"to have all, take load(folder, model) of the exported folder, and give no ckpt_path"
        )
