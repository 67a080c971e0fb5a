"""A run that has ended, and is resumed from a checkpoint of its training: what it left behind is taken, not made anew.

``last.ckpt`` holds the trained, dense model also after ``compressed.ckpt`` was written. Both name their run and date
their clock, so that the one can tell that the other came out of it.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.training.outputs import Outputs
from lightning_compress.training.rank_zero import alone

__all__ = ["earlier_end", "new_run"]


def new_run() -> str:
    """A name for a run; checkpoints carry it on."""
    return secrets.token_hex(8)


def earlier_end(outputs: Outputs, key: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``compressed.ckpt`` holds, if this very run has made it from this very model; every rank calls this.

    Args:
        outputs: Where it and the export are.
        key: The callback's key in a checkpoint.
        own: The callback's state now.
    """
    path = outputs.checkpoint
    if not alone(lambda: _made_from(_read(path), outputs.export, key, own), "looking at compressed.ckpt"):
        return None
    return _read(path)


def _made_from(read: Mapping[str, Any], folder: Path, key: str, own: Mapping[str, Any]) -> bool:
    then = read.get("callbacks", {}).get(key, {})
    same = all(then.get(name) == own[name] for name in ("run", "clock", "recipe"))
    exported = origin_of(folder) == {name: own[name] for name in ("run", "clock")}
    return bool(then) and then["done"] and same and exported


def _read(path: Path) -> dict[str, Any]:
    """Its content; empty when it is not there or not whole (killed while it was written), or holds objects."""
    try:
        read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return {}
    return read
