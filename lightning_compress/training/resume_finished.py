"""A run that has ended, and is resumed from a checkpoint of its training: its results are used, not computed again.

``last.ckpt`` holds the trained, dense model also after ``compressed.ckpt`` was written. Both hold the name of their run
and its clock, which shows whether ``compressed.ckpt`` was made from that very model.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.training.outputs import Outputs
from lightning_compress.training.rank_zero import alone

__all__ = ["is_resumed", "load_earlier_end", "new_run"]


def new_run() -> str:
    """A name for a run; checkpoints carry it on."""
    return secrets.token_hex(8)


def is_resumed(trainer: Trainer) -> bool:
    """Whether the user resumed this run; Lightning's tuner resumes too, from a checkpoint that it has just written."""
    path = trainer.ckpt_path
    return path is not None and not Path(path).name.startswith((".lr_find", ".scale_batch_size"))


def load_earlier_end(
    trainer: Trainer, pl_module: LightningModule, outputs: Outputs, key: str, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Load ``compressed.ckpt`` if this very run has written it from this very model; every rank calls this.

    Args:
        trainer: The Trainer, in its fit.
        pl_module: Gets the compressed weights.
        outputs: Paths of the checkpoint and of the export.
        key: The callback's key in a checkpoint.
        state: The callback's present state.

    Returns:
        The callback's state in that checkpoint; None when there is no such checkpoint.
    """
    path = outputs.checkpoint
    if not alone(lambda: _made_from(_read(path), outputs.export, key, state), "reading compressed.ckpt"):
        return None
    checkpoint = _read(path)
    pl_module.on_load_checkpoint(checkpoint)
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
    exported = origin_of(folder) == {name: state[name] for name in ("run", "clock")}
    return bool(earlier) and earlier["done"] and same and exported


def _read(path: Path) -> dict[str, Any]:
    """The content; empty when the file is missing, incomplete (killed while it was written), or holds objects."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return {}
    return checkpoint
