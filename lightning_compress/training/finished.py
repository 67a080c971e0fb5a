"""A run that has ended, and is resumed from a checkpoint of its training: what it left behind is taken, not made anew.

``last.ckpt`` holds the trained, dense model also after ``compressed.ckpt`` was written. Both name their run and date
their clock, so that the one can tell that the other came out of it.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_compress.training.finish import Plan
from lightning_compress.training.first_rank import alone

__all__ = ["earlier_end", "new_run"]


def new_run() -> str:
    """A name for a run; checkpoints carry it on."""
    return secrets.token_hex(8)


def earlier_end(trainer: Trainer, plan: Plan, key: str, own: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """``compressed.ckpt`` and what it holds, if this very run has made it from this very model; every rank calls this.

    Args:
        trainer: In its fit.
        plan: Where the export is.
        key: The callback's key in a checkpoint.
        own: The callback's state now.
    """
    path = Path(trainer.default_root_dir) / "compressed.ckpt"
    if not alone(lambda: _made_from(_read(path), plan.export_folder(trainer), key, own), "looking at compressed.ckpt"):
        return None
    return path, _read(path)


def _made_from(read: Mapping[str, Any], exported: Path, key: str, own: Mapping[str, Any]) -> bool:
    then = read.get("callbacks", {}).get(key, {})
    same = all(then.get(name) == own[name] for name in ("run", "clock", "recipe"))
    return bool(then) and then["done"] and same and (exported / "model.safetensors").exists()


def _read(path: Path) -> dict[str, Any]:
    """Its content; empty when it is not there or not whole (killed while it was written), or holds objects."""
    try:
        read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return {}
    return read
