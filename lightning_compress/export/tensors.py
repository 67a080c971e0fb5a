"""Named tensors in the safetensors files of a folder: one file, or several and an index, named as Hugging Face does.

Files are not trusted: an index may name files beside it only, and any failure is an error that names the file
(:func:`naming`).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "DTYPES", "INDEX", "DeferredTensor", "TensorFiles", "naming", "read_json", "weight_map", "write_file",
    "write_index", "write_tensors",
]  # fmt: skip

INDEX = "model.safetensors.index.json"
BESIDE = re.compile(r"[^/\\\0]{1,200}\.safetensors")
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""By their names in safetensors files."""


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write model.safetensors, or where that would exceed ``max_shard_bytes`` several files and their index.

    Tensors may share storage, and of equal views the first is written. A file is larger only for a single tensor.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in _without_sharing(tensors).items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    if len(shards) == 1:
        write_file(shards[0], folder / "model.safetensors")
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(shard, folder / file)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    write_index({name: file for file, shard in zip(files, shards, strict=True) for name in shard}, total, folder)


def write_index(weight_map: Mapping[str, str], total_bytes: int, folder: Path) -> None:
    """Write model.safetensors.index.json: the file of each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file with the mode of the umask; safetensors 0.8 alone would make it readable by the owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One entry for each distinct tensor: of equal views the first; views that overlap otherwise are copied."""
    distinct: dict[str, Tensor] = {}
    seen = set()
    storages = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in seen:
            continue
        distinct[name] = tensor.clone() if storage in storages else tensor
        seen.add(view)
        storages.add(storage)
    return distinct


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor that is made when it is needed, and then by ``deferred[...]``, as a slice of a safetensors file is."""

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, _everything: Any) -> Tensor:
        return self.make()

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def on_meta(self) -> Tensor:
        """One of the same shape and dtype, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class TensorFiles:
    """The tensors of a folder; each is read, into memory of its own, when it is needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        by_name = weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
        self.names: dict[str, str] = {}
        self._tensors: dict[str, DeferredTensor] = {}
        for file in sorted(set(by_name.values())) or ["model.safetensors"]:
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; is it a folder that save wrote, and copied completely?")
            with naming(folder / file):
                tensors = _tensors_in(folder / file)
            if twice := [name for name in tensors if name in self.names]:
                raise ValueError(f"{twice[0]!r} is in {folder / file} and in {self.names[twice[0]]}; which one is it?")
            self.names |= dict.fromkeys(tensors, file)
            self._tensors |= tensors
        if wrong := [name for name, file in by_name.items() if self.names.get(name) != file]:
            raise ValueError(
                f"{folder / INDEX}: weight_map says that {wrong[0]!r} is in {by_name[wrong[0]]}, which does not "
                f"hold it; copy the folder again"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that were not taken."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self._tensors.values())

    def path_of(self, name: str) -> Path:
        """The file with this tensor, or where one is missing, the first file."""
        return self.folder / self.names.get(name, next(iter(self.names.values()), "model.safetensors"))

    def check(self, module: str, local_names: tuple[str, ...]) -> None:
        """ValueError when a tensor of a packed module is missing (scales of activations may be)."""
        missing = [n for n in local_names if f"{module}.{n}" not in self.names and not n.startswith("input_")]
        if missing:
            raise ValueError(
                f"{module!r} is quantized, but the files in {self.folder} lack its {', '.join(missing)}; if "
                f"transformers merges this weight with others when it saves, add the module to ignore"
            )

    def take(self, module: str, local_names: tuple[str, ...]) -> dict[str, DeferredTensor]:
        """The tensors of one packed module, by local name, which are no longer in ``rest``; ValueError as `check`."""
        self.check(module, local_names)
        return {n: self._take(f"{module}.{n}") for n in local_names if f"{module}.{n}" in self.names}

    def rest(self) -> dict[str, DeferredTensor]:
        """All tensors that were not taken yet."""
        return {name: self._take(name) for name in list(self.names)}

    def _take(self, name: str) -> DeferredTensor:
        del self.names[name]
        return self._tensors[name]


def _tensors_in(path: Path) -> dict[str, DeferredTensor]:
    with safe_open(path, framework="pt", backend="pread") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is not a dict)
        return {
            name: DeferredTensor(partial(_read, path, name), tuple(part.get_shape()), DTYPES[part.get_dtype()])
            for name, part in slices.items()
        }


def _read(path: Path, name: str) -> Tensor:
    # not through a memory map: that would keep the file open, and its pages resident beside what is made of them
    with naming(path, repr(name)), safe_open(path, framework="pt", backend="pread") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


@contextmanager
def naming(path: Path, key: str = "") -> Iterator[None]:
    """Turn any exception inside into a ValueError that names a file, and a key in it.

    For libraries that raise errors of many kinds on damaged files: safetensors, compressed-tensors, transformers.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        reason = f"{kind}{' '.join(str(error).split()):.600}"
        where = f"{path}, {key}" if key else f"{path}"
        raise ValueError(f"{where}: {reason}; is it a folder that save wrote, and copied completely?") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when the file is not there, or holds anything else."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; is it a folder that save wrote?")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON in UTF-8: {error}; copy the folder again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object; copy the folder again")
    return content


def weight_map(path: Path) -> dict[str, str]:
    """File by tensor; ValueError where it names a file that does not lie beside the index."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: weight_map must be an object of file names by tensor, got {files!r:.80}")
    for name, file in files.items():
        if not isinstance(file, str) or not BESIDE.fullmatch(file):
            raise ValueError(
                f"{path}: weight_map gives {file!r:.200} for {name!r}, expected the name of a .safetensors file in the "
                f"same folder"
            )
    return files
