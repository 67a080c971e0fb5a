"""Names of files and folders that are being written, and the removal of those that a killed process left half-written.

    .<name>.<purpose>-<host>-<process>-<random><suffix>        beside the place where <name><suffix> will be

The name tells the process that writes. Leftovers of a dead process of this host are removed at once, those of another
host or of an unknown process when they are a day old. Those of a living process stay.
"""

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["fsync", "host_name", "is_running", "partial_path", "remove_leftovers"]

DAY = 86400.0
NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<purpose>partial|probe|replaced)-((?P<host>[^-]+)-(?P<process>\d+)-)?[0-9a-f]+(?P<suffix>\.\w+)?"
)


def partial_path(target: Path, purpose: str = "partial", suffix: str = "") -> Path:
    """A free name beside ``target`` for a file or folder that will replace it, or that it replaces.

    Args:
        target: Final path.
        purpose: ``partial`` (half-written), ``probe`` (empty) or ``replaced`` (complete, and without its own name).
        suffix: End of the name, removed from ``target`` where that has it; some writers need one.
    """
    stem = target.name.removesuffix(suffix)
    return target.with_name(f".{stem}.{purpose}-{host_name()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def remove_leftovers(folder: Path, target: Path | None = None) -> None:
    """Remove what dead processes left in ``folder``; a folder that was about to be replaced gets its name back.

    Args:
        folder: Folder to look into; it may be missing.
        target: Remove only leftovers of this path.
    """
    for path, match in _leftovers(folder):
        final = folder / (match["name"] + (match["suffix"] or ""))
        if (target is None or final == target) and _is_abandoned(path, match):
            with suppress(OSError):  # its writer finishes it at this moment
                if match["purpose"] == "replaced" and not final.exists():
                    os.rename(path, final)  # killed before the new one had the name
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _leftovers(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield path, match


def _is_abandoned(path: Path, match: re.Match[str]) -> bool:
    if match["host"] == host_name():
        return not is_running(int(match["process"]))
    try:
        return time.time() - path.stat().st_mtime > DAY
    except OSError:
        return False


def fsync(path: str | Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def host_name() -> str:
    """The name of this machine, letters and digits only."""
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def is_running(process: int) -> bool:
    """Whether a process of this number lives on this machine."""
    if os.name == "nt":
        return True  # there os.kill(process, 0) is a Ctrl-C
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
