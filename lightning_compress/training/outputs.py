"""Where a run writes: resolved once and checked before training, and held by one run at a time.

A lock file in the folder names its holder: machine, process, run and Slurm job. One that a dead process has left is
taken over, and so is that of another machine for the run, or the job, that goes on here.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_compress.files.atomic_folder import check_target
from lightning_compress.files.leftovers import host_name, is_running

__all__ = ["FolderLock", "Outputs"]

SECONDS_TO_WRITE = 60.0  # a lock file that nobody can read after this long was left half-written


@dataclass(frozen=True)
class Outputs:
    """Absolute paths of what a run leaves behind: a later ``os.chdir`` does not move them."""

    export: Path
    report: Path
    checkpoint: Path

    @classmethod
    def of(cls, trainer: Trainer, export_dir: str | None) -> "Outputs":
        """ValueError when ``default_root_dir`` or ``export_dir`` is on another machine."""
        root = _local(trainer.default_root_dir, "default_root_dir")
        export = root / "compressed" if export_dir is None else _local(export_dir, "export_dir")
        return cls(export, root / "report", root / "compressed.ckpt")

    def check(self, *, resumed: bool, run: str) -> None:
        """ValueError now, not after hours of training, when one of them could not be written.

        Args:
            resumed: Whether this run goes on from a checkpoint; then it may replace what it exported before.
            run: Its name.
        """
        if self.report.exists() and not self.report.is_dir():
            raise ValueError(f"{self.report} is a file, and the report goes into a folder of that name; move the file")
        if self.checkpoint.is_dir():
            raise ValueError(f"{self.checkpoint} is a folder, and a checkpoint of that name is written; move it")
        if self.export.is_dir() and any(self.export.iterdir()) and not resumed:
            raise ValueError(
                f"{self.export} exists and is not empty: give another export_dir (or another default_root_dir), or "
                f"remove it; only a run that is resumed replaces what it exported"
            )
        check_target(self.export, overwrite=resumed, run=run)

    @property
    def locks(self) -> list[Path]:
        """The lock files of the run's folder, and of the export where that lies elsewhere."""
        root = self.checkpoint.parent
        beside = self.export.parent / f".{self.export.name}.lock"
        return [root / ".lightning_compress.lock", *([] if self.export.parent == root else [beside])]


def _local(folder: str, argument: str) -> Path:
    if "://" in str(folder):
        raise ValueError(
            f"{argument}={str(folder)!r} is not a folder of this machine, where export, report and compressed.ckpt are "
            f"written: give a local {argument}; checkpoints may go elsewhere by ModelCheckpoint(dirpath=...)"
        )
    return Path(folder).expanduser().resolve()


class FolderLock:
    """Lock files that this run holds."""

    def __init__(self) -> None:
        self._held: dict[Path, dict[str, Any]] = {}

    def acquire(self, path: Path, run: str) -> None:
        """Hold ``path``; its folder is made.

        Raises:
            ValueError: Another run holds it, or it cannot be written.
        """
        own = {"host": host_name(), "process": os.getpid(), "started": _started(os.getpid()), "run": run, "job": _job()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not _create(path, own):
                holder = _read(path)
                if not _is_left_over(path, holder, own):
                    raise ValueError(
                        f"{path.parent} is in use by process {holder.get('process')} on {holder.get('host')}, run "
                        f"{holder.get('run')}, and two runs would overwrite each other: give another default_root_dir "
                        f"(or export_dir); if that process has ended, remove {path}"
                    )
                if holder and holder["host"] != own["host"]:
                    rank_zero_warn(f"going on in {path.parent} for process {holder['process']} on {holder['host']}")
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write into {path.parent}: {error}; choose another folder") from error
        self._held[path] = own

    def release(self) -> None:
        """Let go of all of them; the lock of another run is left alone."""
        for path, own in self._held.items():
            if own["process"] == os.getpid() and _read(path) == own:
                with suppress(OSError):
                    path.unlink()
        self._held = {}


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """False when the file is there already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))
    return True


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says; empty when it is not there or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and isinstance(content["process"], int) and content["host"] else {}
    except (OSError, ValueError, KeyError):
        return {}


def _is_left_over(path: Path, holder: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the holder of a lock is gone, or goes on as this very run."""
    if not holder:
        try:
            return time.time() - path.stat().st_mtime > SECONDS_TO_WRITE
        except FileNotFoundError:
            return True
    if holder["host"] != own["host"]:
        return holder.get("run") == own["run"] or (own["job"] is not None and holder.get("job") == own["job"])
    process = holder["process"]
    return process == own["process"] or not is_running(process) or _started(process) != holder.get("started")


def _started(process: int) -> str:
    """When a process of this machine began, so that another one of its number is told from it; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
