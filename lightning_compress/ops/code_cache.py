"""Machine code on disk that nobody but this user can have written: a driver runs it as it is.

    folder/<key>.cubin    the 32 bytes of the SHA-256 of the code, its length in 8 bytes, the code

A file that is not whole (power was lost) is as good as none. Where there are no owners of files, nothing is kept.
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
    """The codes of one folder.

    Args:
        folder: Made for this user alone (0700) at the first :meth:`write`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        """The code; None when it is not there, not whole, or not this user's."""
        try:
            with self._opened() as folder:
                if folder is None:
                    return None
                descriptor = os.open(f"{key}.cubin", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                with open(descriptor, "rb") as file:
                    ours = _is_ours(descriptor) and stat.S_ISREG(os.fstat(descriptor).st_mode)
                    content = file.read() if ours else b""
        except OSError:
            return None
        digest, size, code = content[:32], content[32:40], content[40:]
        whole = len(code) == int.from_bytes(size, "little") > 0 and hashlib.sha256(code).digest() == digest
        return code if whole else None

    def write(self, key: str, code: bytes) -> None:
        """Keep the code, whole or not at all; a disk that cannot be written is no fault."""
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
        """The folder as a descriptor; None, with a warning, when others may write into it."""
        if not hasattr(os, "getuid"):
            yield None
            return
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if _is_ours(descriptor):
                yield descriptor
            else:
                warnings.warn(
                    f"{self.folder} belongs to another user, or others may write into it: kernels are compiled anew in "
                    f"every process; run chmod 700 on it, or set XDG_CACHE_HOME to a folder of your own",
                    stacklevel=5,
                )
                yield None
        finally:
            os.close(descriptor)


def _is_ours(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    return found.st_uid == os.getuid() and not found.st_mode & WRITABLE_BY_OTHERS
