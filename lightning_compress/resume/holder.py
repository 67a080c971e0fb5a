"""One process at a time writes a folder: a lock on ``holder.json``, which says who has it.

The system drops the lock when the process ends, whatever ends it. Forked children do not hold it.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning_compress.files.leftovers import host_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Holder"]


class Holder:
    """The lock of one folder.

    Args:
        folder: The folder, which is made.

    Raises:
        ValueError: Another process has the lock (it is named), or nothing can be written there.
    """

    def __init__(self, folder: Path):
        self.path = folder / "holder.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write into {folder}: {error}; choose another folder for the log") from error
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{folder} is in use by {self._other()}: wait for it, or give another log") from None
        job = os.environ.get("SLURM_JOB_ID")
        holder = {"host": host_name(), "process": os.getpid(), "job": job, "start": time.strftime("%FT%T%z")}
        self._file.truncate(0)
        self._file.write(f"{json.dumps(holder)}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        self._file.close()

    def _other(self) -> str:
        try:
            holder: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            job = f", job {holder['job']}" if holder["job"] else ""
            return f"process {holder['process']} on {holder['host']}{job}, since {holder['start']}"
        except (OSError, ValueError, KeyError, TypeError):  # it writes its name at this moment
            return "another process"
