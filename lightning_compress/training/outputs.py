"""The paths that a run writes: resolved once, checked before training, and locked by one run at a time.

A lock file in the folder names its holder: machine, process, run and Slurm job. A lock of a dead process is replaced,
and so is that of another machine for the same run, or the same job, which goes on here.
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

from lightning_compress.files.atomic_folder import check_target, origin_of
from lightning_compress.files.leftovers import host_name, is_running
from lightning_compress.training.saved_files import plain_file
from lightning_compress.training.sharding import shards

__all__ = ["FolderLock", "Outputs"]

SECONDS_TO_WRITE = 60.0  # a lock file that cannot be read after this time was left incomplete


@dataclass(frozen=True)
class Outputs:
    """Absolute paths of the results of a run: a later ``os.chdir`` does not move them."""

    export: Path
    report: Path
    checkpoint: Path
    sharded: bool = False  # the checkpoint is a folder
    formats: tuple[str, ...] = ("compressed_tensors",)

    @classmethod
    def of(
        cls, trainer: Trainer, export_dir: str | None, formats: tuple[str, ...] = ("compressed_tensors",)
    ) -> "Outputs":
        """ValueError when ``default_root_dir`` or ``export_dir`` is on another machine."""
        root = _local(trainer.default_root_dir, "default_root_dir")
        export = root / "compressed" if export_dir is None else _local(export_dir, "export_dir")
        return cls(export, root / "report", root / "compressed.ckpt", shards(trainer), formats)

    def check(self, *, resumed: bool, run: str) -> None:
        """ValueError now, not after hours of training, when one of them could not be written.

        A run that is ``resumed`` from a checkpoint may replace its earlier export.
        """
        if self.report.exists() and not self.report.is_dir():
            raise ValueError(f"{self.report} is a file, and the report goes into a folder of that name; move the file")
        if self.checkpoint.is_dir() and not (self.sharded and plain_file(self.checkpoint).is_file()):
            raise ValueError(f"{self.checkpoint} is a folder, and a checkpoint of that name is written; move it")
        for folder in self.folders.values():
            if folder.is_dir() and any(folder.iterdir()) and not resumed:
                raise ValueError(
                    f"{folder} exists and is not empty: give another export_dir (or another default_root_dir), or "
                    f"remove it; only a run that is resumed replaces what it exported"
                )
            check_target(folder, overwrite=resumed, run=run)

    def claim(self, lock: "FolderLock", *, resumed: bool, run: str) -> str:
        """Exclude other runs from these paths, and :meth:`check` that they can be written.

        Returns the name of the run. A job that Slurm has started again without a checkpoint, as where a script answers
        the signal, takes the name in the export of its earlier attempt, and replaces that.
        """
        for path in self.locks:
            lock.acquire(path, run)
        earlier = origin_of(next(iter(self.folders.values())))
        if not resumed and _was_restarted() and earlier.get("job") == os.environ["SLURM_JOB_ID"]:
            run, resumed = earlier["run"], True
        self.check(resumed=resumed, run=run)
        return run

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each format: ``export`` of compressed-tensors, others beside it."""
        paths = {name: self.export.with_name(f"{self.export.name}_{name}") for name in self.formats}
        return {name: self.export if name == "compressed_tensors" else path for name, path in paths.items()}

    @property
    def log(self) -> Path:
        """Folder of the log of the calibration, until the export is complete."""
        return self.checkpoint.parent / "calibration_log"

    @property
    def locks(self) -> list[Path]:
        """The lock files of the run's folder, and of the export where that lies elsewhere."""
        root = self.checkpoint.parent
        of_export = self.export.parent / f".{self.export.name}.lock"
        return [root / ".lightning_compress.lock", *([] if self.export.parent == root else [of_export])]


def _local(folder: str, argument: str) -> Path:
    if "://" in str(folder):
        raise ValueError(
            f"{argument}={str(folder)!r} is not a folder of this machine, where export, report and compressed.ckpt are "
            f"written: give a local {argument}; checkpoints may go elsewhere by ModelCheckpoint(dirpath=...)"
        )
    return Path(folder).expanduser().resolve()


class FolderLock:
    """The lock files of this run."""

    def __init__(self) -> None:
        self._locks: dict[Path, dict[str, Any]] = {}

    def acquire(self, path: Path, run: str) -> None:
        """Create the lock file ``path``, and its folder; ValueError if another run has it, or it cannot be written."""
        process, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
        mine = {"host": host_name(), "process": process, "started": _started(process), "run": run, "job": job}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not _create(path, mine):
                holder = _read(path)
                if not _is_left_over(path, holder, mine):
                    raise ValueError(
                        f"{path.parent} is in use by process {holder.get('process')} on {holder.get('host')}, run "
                        f"{holder.get('run')}, and two runs would overwrite each other: give another default_root_dir "
                        f"(or export_dir); if that process has ended, remove {path}"
                    )
                if holder and holder["host"] != mine["host"]:
                    rank_zero_warn(f"going on in {path.parent} for process {holder['process']} on {holder['host']}")
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write into {path.parent}: {error}; choose another folder") from error
        self._locks[path] = mine

    def release(self) -> None:
        """Remove all of them; the lock of another run stays."""
        for path, content in self._locks.items():
            if content["process"] == os.getpid() and _read(path) == content:
                with suppress(OSError):
                    path.unlink()
        self._locks = {}


def _was_restarted() -> bool:
    """Whether Slurm has started this job before."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """False when the file exists already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))
    return True


def _read(path: Path) -> dict[str, Any]:
    """Content of a lock file; empty when it is missing or incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and isinstance(content["process"], int) and content["host"] else {}
    except (OSError, ValueError, KeyError):
        return {}


def _is_left_over(path: Path, holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether the holder of a lock has ended, or is this very run."""
    if not holder:
        try:
            return time.time() - path.stat().st_mtime > SECONDS_TO_WRITE
        except FileNotFoundError:
            return True
    if holder["host"] != mine["host"]:
        return holder.get("run") == mine["run"] or (mine["job"] is not None and holder.get("job") == mine["job"])
    process = holder["process"]
    return process == mine["process"] or not is_running(process) or _started(process) != holder.get("started")


def _started(process: int) -> str:
    """Start time of a process of this machine, which tells it from a later one of its number; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
