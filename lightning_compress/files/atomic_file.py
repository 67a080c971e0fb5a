"""Write a file atomically: write beside it, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_compress.files.leftovers import fsync, partial_path, remove_leftovers

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, with its suffix; it becomes ``path`` when the block ends without an error.

    Missing folders are made. An older file stays as it is until then. Half-written copies that killed processes left
    behind are removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target)
    partial = partial_path(target, suffix=target.suffix)
    try:
        yield partial
        fsync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
