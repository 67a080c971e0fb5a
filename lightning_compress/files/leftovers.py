"""Names of what is being written, and the removal of what a killed process has left half-written.

    .<name>.<purpose>-<host>-<process>-<random><suffix>        beside the place where <name><suffix> will be

The name says who writes. What a dead process of this host has left is removed at once; what is of another host, or of
an unknown process, when it is a day old. What a living process writes stays.
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

__all__ = ["host_name", "is_running", "partial_path", "remove_leftovers"]

DAY = 86400.0
NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<purpose>partial|probe|replaced)-((?P<host>[^-]+)-(?P<process>\d+)-)?[0-9a-f]+(?P<suffix>\.\w+)?"
)


def partial_path(target: Path, purpose: str = "partial", suffix: str = "") -> Path:
    """A free name beside ``target`` for what will take its place, or makes room for it.

    Args:
        target: The place.
        purpose: ``partial`` (half-written), ``probe`` (empty) or ``replaced`` (whole, and without its own name).
        suffix: The end of the name, taken off ``target`` where it ends so; some writers ask for one.
    """
    stem = target.name.removesuffix(suffix)
    return target.with_name(f".{stem}.{purpose}-{host_name()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def remove_leftovers(folder: Path, target: Path | None = None) -> None:
    """Remove what dead processes have left in ``folder``; a folder that had to give its name away gets it back.

    Args:
        folder: Where to look; it may be missing.
        target: Remove only what is of this name.
    """
    for path, match in _leftovers(folder):
        place = folder / (match["name"] + (match["suffix"] or ""))
        if (target is None or place == target) and _is_abandoned(path, match):
            with suppress(OSError):  # its writer has just finished it
                if match["purpose"] == "replaced" and not place.exists():
                    os.rename(path, place)  # killed before the new one had the name
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
