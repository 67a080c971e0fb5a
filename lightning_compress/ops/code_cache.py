"""Machine code on disk, in files that only this user can write, since a driver runs the code without checks.

    folder/<key>.cubin    the 32 bytes of the SHA-256 of the code, its length in 8 bytes, the code

An incomplete file (after a power failure) counts as missing. On systems without owners of files nothing is stored.
"""

import contextlib
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CodeCache"]

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CodeCache:
    """Machine code in one folder.

    Args:
        folder: Path of the folder; the first :meth:`write` makes it, for this user alone (0700).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        """The code; None if the file is missing, incomplete, or not owned by this user."""
        try:
            with self._opened() as folder:
                if folder is None:
                    return None
                descriptor = os.open(f"{key}.cubin", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                with open(descriptor, "rb") as file:
                    trusted = _is_private(descriptor) and stat.S_ISREG(os.fstat(descriptor).st_mode)
                    content = file.read() if trusted else b""
        except OSError:
            return None
        digest, size, code = content[:32], content[32:40], content[40:]
        complete = len(code) == int.from_bytes(size, "little") > 0 and hashlib.sha256(code).digest() == digest
        return code if complete else None

    def write(self, key: str, code: bytes) -> None:
        """Store the code in one step, complete or not at all; a disk that cannot be written is not an error."""
        if not hasattr(os, "getuid"):
            return
        partial = f".{key}.{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            with self._opened() as folder:
                if folder is None:
                    return
                try:
                    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
                    with open(descriptor, "wb") as file:
                        file.write(hashlib.sha256(code).digest() + len(code).to_bytes(8, "little") + code)
                        file.flush()
                        os.fsync(descriptor)
                    os.replace(partial, f"{key}.cubin", src_dir_fd=folder, dst_dir_fd=folder)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(partial, dir_fd=folder)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """The folder as a descriptor; None, with a warning, if other users may write into it."""
        if not hasattr(os, "getuid"):
            yield None
            return
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if _is_private(descriptor):
                yield descriptor
            else:
                warnings.warn(
                    f"{self.folder} belongs to another user, or others may write into it: kernels are compiled again "
                    f"in every process; run chmod 700 on it, or set XDG_CACHE_HOME to a folder of your own",
                    stacklevel=5,
                )
                yield None
        finally:
            os.close(descriptor)


def _is_private(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return status.st_uid == os.getuid() and not status.st_mode & WRITABLE_BY_OTHERS
