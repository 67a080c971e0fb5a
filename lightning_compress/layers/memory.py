"""Memory that a walk has freed goes back to the system.

glibc keeps what is freed: pieces of up to 32 MiB stay in heaps, of which every thread has one, up to 64 MiB each. After
a walk in lockstep over 571 MiB of weights another 390 MiB were resident that nothing owned.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["GrowthRelease", "bytes_of", "peak_memory_bytes", "release", "resident", "small_heap"]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
         "TIB": 2**40}  # fmt: skip

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_LARGEST = 2**25  # bytes; at 1 MiB, which glibc would map and unmap each time, page faults take 10 % more CPU


def release() -> None:
    """Give the free pages of all heaps back to the system, where the C library is glibc; takes 0.1 ms."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


class GrowthRelease:
    """:func:`release`, each time that the process has grown by 24 MiB since: pages that come again cost CPU time."""

    GROWTH = 24 * 2**20

    def __init__(self) -> None:
        self._least = 0

    def __call__(self) -> None:
        size = resident()
        if size is None or size - self._least > self.GROWTH:
            release()
            self._least = resident() or 0
        else:
            self._least = min(self._least, size)


def resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not say, which takes 40 us."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


@contextmanager
def small_heap(largest: int = _LARGEST, keep: int = 2**17) -> Iterator[None]:
    """Inside, glibc does not raise the sizes from which it maps memory and from which it returns free memory.

    Pieces of more than ``largest`` bytes are mapped, and returned when they are freed; so is the end of the heap where
    more than ``keep`` bytes of it are free, and at the end all that is free. Afterwards the sizes are those that the
    adjustment of glibc ends at. Limits in the environment are obeyed.
    """
    libc = None if any(name.startswith("MALLOC_") for name in os.environ) else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, largest)
    libc.mallopt(_TRIM_THRESHOLD, keep)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process; None where it is another one than glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def bytes_of(limit: int | str, name: str = "memory_limit") -> int:
    """The bytes that ``300MB``, ``1.5 GiB`` or a number stands for; ValueError with this name for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(limit))
    factor = UNITS.get(match[2].upper() or "B") if match else None
    if match is None or factor is None:
        raise ValueError(f"{name}={limit!r}: expected bytes, as a number or such as '300MB' or '2GiB'")
    return int(float(match[1]) * factor)


def peak_memory_bytes() -> int | None:
    """Peak resident memory of the process in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
