"""Checkpoint files that this process saved: they may be unpickled, and no other file is.

A strategy that shards the model makes a folder of a checkpoint: shards, and a file with all else, which is meant here.

A date proves nothing: the sender of a file chooses it, and the path of the best file is read from a checkpoint, too.
So the inode, size and time of change of each file are recorded when it is saved, and compared before it is read.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_compress.training.sharding import shards

__all__ = ["SavedFiles", "plain_file"]


class SavedFiles:
    """The checkpoint files that this process saved, as they were right after that."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[int, ...]] = {}

    def watch(self, trainer: Trainer) -> Callable[[], None]:
        """Record all files that ``trainer`` saves from now on; returns a function that ends this."""
        writer: Any = trainer.strategy if shards(trainer) else trainer.strategy.checkpoint_io
        save = writer.save_checkpoint

        def save_and_note(checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
            save(checkpoint, path, *args, **kwargs)
            if shards(trainer):
                trainer.strategy.barrier()  # rank 0 has written the file
            self.note(path)

        vars(writer)["save_checkpoint"] = save_and_note  # on this object only

        def undo() -> None:
            if vars(writer).get("save_checkpoint") is save_and_note:
                del vars(writer)["save_checkpoint"]

        return undo

    def note(self, path: str | Path) -> None:
        """Record a file that was just saved; not one that is remote, or that AsyncCheckpointIO writes later."""
        resolved = plain_file(path)
        if resolved.is_file():
            self._files[resolved] = _state(resolved)

    def __contains__(self, path: str | Path) -> bool:
        resolved = plain_file(path)
        return resolved in self._files and resolved.is_file() and self._files[resolved] == _state(resolved)

    def will_refuse(self, path: str | Path) -> bool:
        """Whether :meth:`read` refuses this file as it is now; tensors are not read."""
        if path in self or not plain_file(path).is_file():
            return False
        try:
            torch.load(plain_file(path), map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            return True
        except Exception:  # an error comes when it is read, if it is then still the best
            return False
        return False

    def read(self, path: str, trainer: Trainer) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values, and objects too where this process saved the file.

        Of a folder all but the shards, which :meth:`load_shards` loads.

        Raises:
            ValueError: Another process saved it, and it holds objects.
        """
        try:
            if not shards(trainer):
                return trainer.strategy.load_checkpoint(path, weights_only=True)
            checkpoint: dict[str, Any] = torch.load(plain_file(path), map_location="cpu", weights_only=True)
            return checkpoint
        except pickle.UnpicklingError:
            if path not in self:
                raise ValueError(
                    f"{path} was not saved by this process and holds more than tensors and plain values, so it is not "
                    f"opened: objects in a checkpoint can run code; compress the last weights with load_best=False, "
                    f"or leave objects out of checkpoints: save_hyperparameters(ignore=[...])"
                ) from None
        loaded: dict[str, Any] = torch.load(plain_file(path), map_location="cpu", weights_only=False)
        return loaded

    def load_shards(self, path: str, trainer: Trainer) -> None:
        """Load the weights of a folder that :meth:`read` has read into the sharded model; every rank calls this."""
        trainer.strategy.load_checkpoint(path, weights_only=path not in self)


def plain_file(path: str | Path) -> Path:
    """The checkpoint, or the file with all but the shards in its folder."""
    resolved = Path(path).resolve()
    return resolved / "meta.pt" if resolved.is_dir() else resolved


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
