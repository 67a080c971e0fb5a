"""A teacher's answers on disk: computed once for each sample, read in later epochs.

    folder/<identity>/<host>-<process>-<random>.safetensors      shards of many samples, each written once

A sample's answer is a few tensors with one row per token. A shard holds the keys of its samples, where each ends, a
CRC-32 of each, and the rows of all of them one after another. Shards are written atomically, and no two writers share
one, so ranks and runs may share a folder; :meth:`AnswerCache.refresh` reads new shards of others. The identity of the
answers (the teacher, the number of logits) names the sub-folder, so answers of another teacher are never used. Nor is
an answer with a wrong CRC: a warning names its shard, which is skipped.
"""

import hashlib
import json
import os
import secrets
import shutil
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_compress.files.atomic_file import whole_file
from lightning_compress.files.leftovers import host_name, remove_leftovers

__all__ = ["AnswerCache"]

OPEN_SHARDS = 128  # mapped at a time; a process may open 1024 files on most machines
TABLES = ("keys", "ends", "checks")  # of a shard, besides the tensors of its answers


class AnswerCache:
    """Tensors by key, in memory until a shard is full, then on disk.

    Args:
        folder: Folder of all caches; each identity has a sub-folder.
        identity: All that the answers depend on, besides the sample.
        limit: Largest size of this identity on disk in bytes, for all ranks together; then no more answers are added.
        shard: Size of a shard in bytes.

    Raises:
        ValueError: ``folder`` is a file, or cannot be made.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], limit: float, shard: int = 2**26) -> None:
        self.identity = json.dumps(dict(identity), sort_keys=True)
        self.folder = Path(folder).expanduser() / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        self.limit, self.shard = limit, shard
        self.full = False
        self.bytes = 0  # on disk, of all ranks
        self._places: dict[bytes, tuple[str, int, int, int]] = {}  # shard, first row, row after the last, CRC
        self._shards: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._pending: dict[bytes, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache_dir={str(folder)!r} cannot be made: {error}; choose another") from error
        remove_leftovers(self.folder)
        self.refresh()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._places) + len(self._pending)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or key in self._places

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The answer to a sample; None when it is missing, or damaged: a warning then names its shard."""
        if key in self._pending or key not in self._places:
            return self._pending.get(key)
        name, first, last, check = self._places[key]
        try:
            shard = self._mapped(name)
            answer = {part: shard.get_slice(part)[first:last] for part in shard.keys() if part not in TABLES}  # noqa: SIM118
            fault = None if _check(key, answer) == check else "an answer is not the one that was written"
        except (IndexError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            fault = str(error)
        if fault is None:
            return answer
        self._pass_over(name, fault)
        self._open.pop(name, None)
        self._places = {known: place for known, place in self._places.items() if place[0] != name}
        return None

    def put(self, key: bytes, answer: Mapping[str, Tensor]) -> None:
        """Add an answer, its tensors with one row per token, unless it is in the cache, or the cache is full."""
        if key in self or self.full:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in answer.items()}
        size = sum(tensor.nbytes for tensor in tensors.values()) + len(key) + 16
        if self.bytes + self._pending_bytes + size > self.limit:
            self.full = True
            self.flush()
            warnings.warn(
                f"the teacher cache in {self.folder} is full: {len(self):,} samples take {self.bytes / 2**30:.2f} of "
                f"cache_limit_gib={self.limit / 2**30:g}; the teacher goes on running for all others. Raise the "
                f"limit, or keep fewer logits (top_k)",
                stacklevel=2,
            )
            return
        self._pending[key] = tensors
        self._pending_bytes += size
        if self._pending_bytes >= self.shard:
            self.flush()

    def flush(self) -> None:
        """Write pending answers as a shard. A full disk is a warning: training goes on with the teacher."""
        if not self._pending:
            return
        answers = list(self._pending.values())
        rows = [next(iter(answer.values())).shape[0] for answer in answers]
        tensors = {part: torch.cat([answer[part] for answer in answers]) for part in answers[0]}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(self._pending)), dtype=torch.uint8).view(len(answers), -1)
        tensors["ends"] = torch.tensor(rows, dtype=torch.int64, device="cpu").cumsum(0)
        checks = [_check(key, answer) for key, answer in self._pending.items()]
        tensors["checks"] = torch.tensor(checks, dtype=torch.int64, device="cpu")
        name = f"{host_name()}-{os.getpid()}-{secrets.token_hex(8)}.safetensors"
        try:
            with whole_file(self.folder / name) as partial:
                save_file(tensors, partial, metadata={"identity": self.identity})
        except (OSError, SafetensorError) as error:
            self.full = True
            warnings.warn(
                f"the teacher cache cannot be written: {error}; no more answers are added, the teacher goes on running",
                stacklevel=2,
            )
        else:
            self._learn(name)
        self._pending, self._pending_bytes = {}, 0

    def refresh(self) -> None:
        """Read the tables of new shards of other ranks and runs."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name not in self._shards:
                self._learn(path.name)

    def free(self) -> int:
        """Bytes that are free on the disk."""
        return shutil.disk_usage(self.folder).free

    def close(self) -> None:
        """Write pending answers, and close the files."""
        self.flush()
        self._open.clear()

    def _learn(self, name: str) -> None:
        """Read which samples a shard holds; a warning names one that is damaged or holds other answers."""
        self._shards.add(name)
        path = self.folder / name
        try:
            with safe_open(path, "pt") as shard:
                identity = (shard.metadata() or {}).get("identity")
                keys, ends, checks = (shard.get_tensor(table) for table in TABLES)
            size = path.stat().st_size
        except (OSError, SafetensorError) as error:
            self._pass_over(name, str(error))
            return
        if identity != self.identity:
            warnings.warn(f"{path} holds the answers of another teacher ({identity}): passed over", stacklevel=3)
            return
        if (fault := _fault(keys, ends, checks)) is not None:
            self._pass_over(name, fault)
            return
        self.bytes += size
        first = 0
        for key, last, check in zip(keys, ends.tolist(), checks.tolist(), strict=True):
            self._places.setdefault(key.numpy().tobytes(), (name, first, last, check))
            first = last

    def _pass_over(self, name: str, fault: str) -> None:
        path = self.folder / name
        warnings.warn(f"{path} is not a whole file of a teacher cache ({fault}): passed over; remove it", stacklevel=3)

    def _mapped(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[name] = safe_open(self.folder / name, "pt").__enter__()
        self._open.move_to_end(name)
        return self._open[name]


def _check(key: bytes, answer: Mapping[str, Tensor]) -> int:
    """CRC-32 of an answer: its key, and the name, dtype, shape and bytes of each part."""
    total = zlib.crc32(key)
    for part in sorted(answer):
        tensor = answer[part]
        total = zlib.crc32(f"{part} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


def _fault(keys: Tensor, ends: Tensor, checks: Tensor) -> str | None:
    """What is wrong with the tables of a shard."""
    if keys.dtype != torch.uint8 or keys.dim() != 2:
        return f"its keys are {keys.dtype} {list(keys.shape)}, expected uint8 [samples, bytes]"
    for table, values in (("ends", ends), ("checks", checks)):
        if values.dtype != torch.int64 or values.shape != keys.shape[:1]:
            return f"its {table} are {values.dtype} {list(values.shape)}, expected int64 [{len(keys)}]"
    if (ends.diff(prepend=torch.zeros(1, dtype=torch.int64, device="cpu")) < 0).any():
        return "its ends do not ascend from 0"
    return None
