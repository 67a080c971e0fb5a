"""Write a folder so that it is there whole or not at all: write beside, fsync, rename.

While it is written it is called ``.<name>.partial-<random>`` and lies beside its place, on the same file system, so
that the last step is one rename. An error or an interrupt removes it; after a kill only that hidden name is left.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["check_target", "whole_folder"]


def check_target(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Say now whether ``folder`` can be written later, before hours of work; leaves nothing behind.

    Args:
        folder: Where the result shall lie. Parents that are missing would be made.
        overwrite: Whether an earlier export may be replaced.

    Returns:
        The absolute path, symbolic links resolved.

    Raises:
        ValueError: It is a file, it is not empty and may not be replaced, or no folder can be made beside it.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected the name of a folder to write; choose another")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} exists and is not empty; choose another, or replace it by overwrite=True")
        if not (target / "config.json").is_file() or not any(target.glob("*.safetensors")):
            raise ValueError(
                f"{target} does not look like an earlier export (config.json and *.safetensors), "
                f"so overwrite=True does not delete it; choose another folder"
            )
    made = _make_parents(target)
    try:
        _make_sibling(target, "probe").rmdir()
    finally:
        _remove_parents(made)
    return target


@contextmanager
def whole_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``folder`` when the ``with`` block ends without an error.

    An existing ``folder`` stays as it is until the new one is on the disk; an error leaves it untouched.

    Args:
        folder: Where the result shall lie.
        overwrite: Replace an earlier export.

    Yields:
        The folder to write into.

    Raises:
        ValueError: See :func:`check_target`.
    """
    target = check_target(folder, overwrite=overwrite)
    made = _make_parents(target)
    try:
        partial = _make_sibling(target, "partial")
        try:
            yield partial
            _sync(partial)
            _swap_in(partial, target, overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except BaseException:
        _remove_parents(made)
        raise


def _make_parents(target: Path) -> list[Path]:
    """Make the missing parents of ``target``; returns those that were made, outermost first."""
    missing = [p for p in reversed(target.parents) if not p.exists()]
    for number, parent in enumerate(missing):
        try:
            parent.mkdir(exist_ok=True)
        except OSError as error:
            _remove_parents(missing[:number])
            raise ValueError(f"cannot make {parent}, where {target} shall lie: {error}; choose another") from error
    return missing


def _make_sibling(target: Path, purpose: str) -> Path:
    sibling = target.parent / f".{target.name}.{purpose}-{secrets.token_hex(4)}"
    try:
        sibling.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write into {target.parent}: {error}; choose another folder") from error
    return sibling


def _remove_parents(made: list[Path]) -> None:
    for parent in reversed(made):
        with suppress(OSError):                     # somebody else uses it by now
            parent.rmdir()


def _sync(folder: Path) -> None:
    """Force all files and folders below ``folder`` to the disk, the folder last."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in [*files, ""]:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _swap_in(partial: Path, target: Path, overwrite: bool) -> None:
    """Give ``partial`` the name ``target``; an older folder of that name steps aside first, and back on an error.

    Without ``overwrite`` the rename itself refuses a folder that was filled meanwhile.
    """
    old = None
    if overwrite and target.is_dir() and any(target.iterdir()):
        old = target.parent / f".{target.name}.replaced-{secrets.token_hex(4)}"
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
