"""Write a folder atomically: write beside it, fsync, rename.

While it is written it is called ``.<name>.partial-<host>-<process>-<random>`` and lies beside its final path, on the
same file system, so that the last step is one rename. An older export is exchanged for it in one step where the system
can do that (Linux); elsewhere it is renamed first, and gets its name back at the next start if the process is killed
then. An error or an interrupt removes the half-written folder; the next process removes what a killed one left.

``export_manifest.json`` names the files of a folder and the run that wrote it. No other folder is ever replaced:

    {"files": [names, in order], "origin": {"run": name of the run, ...} or null}
"""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_compress.files.leftovers import fsync, partial_path, remove_leftovers

__all__ = ["MANIFEST", "check_target", "files_and_manifest", "origin_of", "swap_in", "whole_folder"]

MANIFEST = "export_manifest.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_target(folder: str | Path, *, overwrite: bool = False, run: str | None = None) -> Path:
    """Check before hours of work that ``folder`` can be written later; nothing is left behind.

    Args:
        folder: Folder of the result. Missing parents would be made.
        overwrite: Whether an earlier export may be replaced.
        run: Replace only an export that this run wrote.

    Returns:
        The absolute path, symbolic links resolved.

    Raises:
        ValueError: It is a file, it is not empty and may not be replaced, or no folder can be made beside it.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected the name of a folder to write; choose another")
    remove_leftovers(target.parent, target)
    _check_replaceable(target, overwrite, run)
    parents = _make_parents(target)
    try:
        _make_sibling(target, "probe").rmdir()
    finally:
        _remove_parents(parents)
    return target


def origin_of(folder: Path) -> dict[str, Any]:
    """The origin in the manifest of a folder; empty without one."""
    return _manifest(folder).get("origin") or {}


def files_and_manifest(folder: Path) -> tuple[set[str], set[str]]:
    """The files in a folder but for the manifest, and those that the manifest lists; none where it is not there."""
    return _files(folder) - {MANIFEST}, set(_manifest(folder).get("files", ()))


@contextmanager
def whole_folder(
    folder: str | Path, *, overwrite: bool = False, origin: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``folder`` when the ``with`` block ends without an error.

    An existing ``folder`` stays as it is until the new one is on the disk; an error leaves it untouched.

    Args:
        folder: Folder of the result.
        overwrite: Replace an earlier export.
        origin: Stored in the manifest; an earlier export is replaced only if it has the same ``origin["run"]``.

    Yields:
        The folder to write into.

    Raises:
        ValueError: See :func:`check_target`.
    """
    run = None if origin is None else origin["run"]
    target = check_target(folder, overwrite=overwrite, run=run)
    parents = _make_parents(target)
    try:
        partial = _make_sibling(target, "partial")
        try:
            yield partial
            swap_in(partial, target, overwrite=overwrite, origin=origin)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except BaseException:
        _remove_parents(parents)
        raise


def swap_in(partial: Path, target: Path, *, overwrite: bool = False, origin: Mapping[str, Any] | None = None) -> None:
    """Turn a complete folder beside ``target`` into ``target``: manifest, fsync, one rename.

    Raises:
        ValueError: ``target`` was filled meanwhile and must not be replaced.
    """
    _write_manifest(partial, origin)
    _sync(partial)
    _check_replaceable(target, overwrite, None if origin is None else origin["run"])
    _swap(partial, target)


def _check_replaceable(target: Path, overwrite: bool, run: str | None) -> None:
    """ValueError when ``target`` holds anything that must not be replaced."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} exists and is not empty; choose another, or replace it by overwrite=True")
    manifest = _manifest(target)
    if not manifest:
        raise ValueError(
            f"{target} has no {MANIFEST}, so that this package did not write it (or an earlier version did), and it is "
            f"not replaced; choose another folder, or remove it yourself"
        )
    if foreign := sorted(_files(target) - {MANIFEST, *manifest["files"]}):
        raise ValueError(
            f"{target} holds {', '.join(foreign[:5])}, which this package did not write, so that the folder is not "
            f"replaced; move these files, or choose another folder"
        )
    if run is not None and (manifest["origin"] or {}).get("run") != run:
        raise ValueError(
            f"{target} was not written by this run, so that it is not replaced; choose another folder, or remove it"
        )


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest; empty without one, or where :func:`_write_manifest` did not write it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    listed = isinstance(manifest, dict) and isinstance(manifest.get("files"), list)
    valid = listed and all(isinstance(name, str) for name in manifest["files"])
    return manifest if valid and isinstance(manifest.get("origin"), dict | None) else {}


def _write_manifest(folder: Path, origin: Mapping[str, Any] | None) -> None:
    content = {"files": sorted(_files(folder)), "origin": None if origin is None else dict(origin)}
    text = json.dumps(content, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _files(folder: Path) -> set[str]:
    """All files below ``folder``, and empty folders."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return {path.relative_to(folder).as_posix() for path in paths}


def _make_parents(target: Path) -> list[Path]:
    """Make the missing parents of ``target``; returns the new ones, outermost first."""
    missing = [p for p in reversed(target.parents) if not p.exists()]
    for number, parent in enumerate(missing):
        try:
            parent.mkdir(exist_ok=True)
        except OSError as error:
            _remove_parents(missing[:number])
            raise ValueError(f"cannot make {parent}, the parent of {target}: {error}; choose another") from error
    return missing


def _make_sibling(target: Path, purpose: str) -> Path:
    sibling = partial_path(target, purpose)
    try:
        sibling.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write into {target.parent}: {error}; choose another folder") from error
    return sibling


def _remove_parents(parents: list[Path]) -> None:
    for parent in reversed(parents):
        with suppress(OSError):  # another process uses it by now
            parent.rmdir()


def _sync(folder: Path) -> None:
    """Force all files and folders below ``folder`` to the disk, the folder last."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in [*files, ""]:
            fsync(os.path.join(parent, name))


def _swap(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; an earlier export keeps that name until then.

    The plain rename refuses a folder that was filled meanwhile.
    """
    old = None
    if target.is_dir() and any(target.iterdir()):
        if _exchange(partial, target):
            old = partial
        else:
            old = partial_path(target, "replaced")
            os.rename(target, old)
    try:
        if old is not partial:
            os.rename(partial, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    fsync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE)
    return result == 0
