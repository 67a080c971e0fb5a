"""Write a file so that it is there whole or not at all: write beside, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_compress.files.leftovers import partial_path, remove_leftovers

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, with its suffix; it becomes ``path`` when the block ends without an error.

    Folders that are missing are made. An older file stays as it is until then. What killed processes have left of
    this file half-written is removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target)
    partial = partial_path(target, suffix=target.suffix)
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
