"""Write an export shard by shard; the shards that are written are also what a killed run continues from.

    .<name>.partial/model-00002-of-00014.safetensors    tensors of one group of modules
    .<name>.partial/log/00002.json                      written after it: its checksum, and what else a run must know
    <name>/                                             after finish(): shards, index, other files; no log

    writer = ShardWriter(target, count=14)
    shards = writer.finished()                          # after a kill: those that are complete, from number 1 on
    tensors = writer.read(shards[0])                    # one of them
    writer.write(2, tensors, {"random_state": ...}, rows=[...])
    (writer.folder / "config.json").write_text(...)     # other files of the export: after the last shard
    (writer.log / "plan.json").write_text(...)          # other files of the log: removed by finish()
    writer.finish()                                     # index, manifest, one rename
    writer.discard()                                    # or begin anew

Each file is written beside its place, forced to the disk and renamed; the JSON follows its shard:

    {"format_version": 1, "bytes": size of the shard, "sha256": its checksum, "tensors": [names],
     "rows": [rows of the ledger], "facts": {...}}

Several processes may write, each shards of its own; one of them opens the folder, and finishes it. Files that are read
back are not trusted: sizes are bounded before parsing, names in the JSON must be those of the shard, and no path comes
out of a file.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lightning_compress.export.tensor_file import TensorFile
from lightning_compress.export.tensors import write_file, write_index
from lightning_compress.files.atomic_file import whole_file
from lightning_compress.files.atomic_folder import check_target, swap_in
from lightning_compress.files.bounded_json import read_bounded_json
from lightning_compress.files.leftovers import fsync

__all__ = ["Shard", "ShardWriter"]

FORMAT_VERSION = 1
ENTRY_BYTES = 2**26  # of a file of the log
KINDS = {"format_version": int, "bytes": int, "sha256": str, "tensors": list, "rows": list, "facts": dict}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A shard on the disk.

    Args:
        number: From 1 up.
        names: Its tensors.
        rows: Rows of the ledger, as ``Ledger.state_dict`` gives them.
        facts: What else the writer of the shard stored.
        tensor_bytes: Size of the tensors.
    """

    number: int
    names: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensor_bytes: int = 0


class ShardWriter:
    """An export that is written in ``count`` shards, numbered from 1.

    Args:
        target: Folder of the result; missing parents are made.
        count: Number of shards.
        overwrite: Replace an earlier export of that name.
        origin: Written to the manifest; see :func:`lightning_compress.files.atomic_folder.whole_folder`.
        opens: False: another process has opened the folder, and finishes it.

    Raises:
        ValueError: ``target`` cannot be written; see :func:`lightning_compress.files.atomic_folder.check_target`.
    """

    def __init__(
        self,
        target: str | Path,
        count: int,
        *,
        overwrite: bool = False,
        origin: Mapping[str, Any] | None = None,
        opens: bool = True,
    ):
        run = None if origin is None else origin["run"]
        self.target = check_target(target, overwrite=overwrite, run=run) if opens else Path(target)
        self.count, self.overwrite, self.origin = count, overwrite, origin
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.log = self.folder / "log"
        self._log_aside = self.target.with_name(f".{self.target.name}.log")  # while finish() renames the folder
        self._shards: dict[int, Shard] = {}
        if opens:
            self._open()

    def finished(self, in_order: bool = True) -> list[Shard]:
        """The complete shards, in order; others must be written again, and with ``in_order`` all after one of them."""
        self._shards = {}
        for number in range(1, self.count + 1):
            try:
                self._shards[number] = self._check(number)
            except (OSError, ValueError) as error:
                if self._entry(number).exists():
                    after = " and those after it are" if in_order else " is"
                    logger.warning("shard %d%s done again: %s", number, after, error)
                for later in range(number, self.count + 1 if in_order else number + 1):
                    self._entry(later).unlink(missing_ok=True)
                if in_order:
                    break
        return list(self._shards.values())

    def shards(self) -> list[Shard]:
        """Those that this process knows of."""
        return list(self._shards.values())

    def add(self, shards: Iterable[Shard]) -> None:
        """Take shards that other processes have written."""
        self._shards |= {shard.number: shard for shard in shards}

    def read(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a shard."""
        file = TensorFile(self._path(shard.number))
        return {name: file.read(name) for name in shard.names}

    def write(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a shard and its entry of the log; when this returns, both are on the disk.

        Raises:
            OSError: The disk is full, or cannot be written to. Earlier shards stay.
        """
        assert 1 <= number <= self.count, f"shard {number} of {self.count}"
        earlier = {name for other, shard in self._shards.items() if other != number for name in shard.names}
        assert not (twice := earlier & tensors.keys()), f"{twice} are in two shards"
        tensors = _distinct(tensors)
        try:
            self._entry(number).unlink(missing_ok=True)
            with whole_file(self._path(number)) as partial:
                write_file(tensors, partial)
                size, checksum = partial.stat().st_size, _checksum(partial)
            fsync(self.folder)
            entry: dict[str, Any] = {
                "format_version": FORMAT_VERSION, "bytes": size, "sha256": checksum, "tensors": list(tensors),
                "rows": [dict(row) for row in rows], "facts": dict(facts or {}),
            }  # fmt: skip
            with whole_file(self._entry(number)) as partial:
                partial.write_text(f"{json.dumps(entry)}\n", encoding="utf-8")
            fsync(self.log)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"writing {self._path(number)} failed: {error}; is the disk full? Finished shards stay there, and the "
                f"same call continues with them"
            ) from error
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._shards[number] = Shard(number, tuple(tensors), entry["rows"], entry["facts"], size)

    def finish(self) -> Path:
        """Write the index, drop the log, and give the folder its name.

        A kill at any moment leaves either the complete export, or a folder that the same calls finish.
        """
        missing = [number for number in range(1, self.count + 1) if number not in self._shards]
        assert not missing, f"shards {missing} of {self.count} are missing"
        shards = [self._shards[number] for number in range(1, self.count + 1)]
        weight_map = {name: self._path(shard.number).name for shard in shards for name in shard.names}
        write_index(weight_map, sum(shard.tensor_bytes for shard in shards), self.folder)
        os.rename(self.log, self._log_aside)
        try:
            swap_in(self.folder, self.target, overwrite=self.overwrite, origin=self.origin)
        except BaseException:
            os.rename(self._log_aside, self.log)
            raise
        shutil.rmtree(self._log_aside)
        return self.target

    @property
    def is_empty(self) -> bool:
        """Whether no shard has been written."""
        return not any(self._entry(number).exists() for number in range(1, self.count + 1))

    def discard(self) -> None:
        """Remove all shards and the log, to begin anew."""
        shutil.rmtree(self.folder)
        self._open()

    def _open(self) -> None:
        """The folder as a killed process left it, without files that belong to neither the shards nor the log."""
        if self._log_aside.exists() and self.folder.exists() and not self.log.exists():
            os.rename(self._log_aside, self.log)  # killed inside of finish()
        shutil.rmtree(self._log_aside, ignore_errors=True)
        self.log.mkdir(parents=True, exist_ok=True)
        keep = {self.log, *(self._path(number) for number in range(1, self.count + 1))}
        for path in set(self.folder.iterdir()) - keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number:05}-of-{self.count:05}.safetensors"

    def _entry(self, number: int) -> Path:
        return self.log / f"{number:05}.json"

    def _check(self, number: int) -> Shard:
        """The shard of an entry; OSError or ValueError where one of them is missing or damaged."""
        path, entry = self._path(number), _read_entry(self._entry(number))
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes, and {entry['bytes']} were written")
        if (checksum := _checksum(path)) != entry["sha256"]:
            raise ValueError(f"{path} has sha256 {checksum}, and {entry['sha256']:.64} was written")
        file = TensorFile(path)
        if set(file.names) != set(entry["tensors"]) or len(file.names) != len(entry["tensors"]):
            raise ValueError(f"{path} does not hold the tensors that {self._entry(number)} names")
        if twice := {n for shard in self._shards.values() for n in shard.names} & set(file.names):
            raise ValueError(f"{path} holds {min(twice)!r:.200}, which is in an earlier shard")
        size = sum(file.nbytes(name) for name in file.names)
        return Shard(number, tuple(entry["tensors"]), entry["rows"], entry["facts"], size)


def _read_entry(path: Path) -> dict[str, Any]:
    """One JSON of the log; ValueError where this class did not write it."""
    entry = read_bounded_json(path, ENTRY_BYTES)
    kinds = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
    if kinds != KINDS or entry["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} is not an entry of format_version {FORMAT_VERSION}")
    if not all(isinstance(n, str) for n in entry["tensors"]) or not all(isinstance(r, dict) for r in entry["rows"]):
        raise ValueError(f"{path}: tensors must be names, and rows objects")
    return entry


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with memory of its own: safetensors refuses shared memory."""
    distinct: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.numel() and tensor.untyped_storage().data_ptr() in storages
        distinct[name] = tensor.clone() if shared else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    return distinct
