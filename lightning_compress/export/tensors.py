"""Named tensors in the safetensors files of a folder: one file, or several and an index, named as Hugging Face does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["TensorFiles", "read_json", "write_tensors"]

INDEX = "model.safetensors.index.json"


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write model.safetensors, or where that would exceed ``max_shard_bytes`` several files and their index.

    Args:
        tensors: In any number of views of one storage; of equal ones the first is written.
        folder: Exists.
        max_shard_bytes: A file is larger only when one tensor is.
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
        _save(shards[0], folder / "model.safetensors")
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _save(shard, folder / file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """One file, readable by whom the umask says; safetensors 0.8 alone would make it the owner's only (0600)."""
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


class TensorFiles:
    """The tensors of a folder, each read when it is taken."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if (folder / INDEX).exists() else []
        self.names: dict[str, str] = {}
        for file in files or ["model.safetensors"]:
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; is it a folder that save wrote, and copied whole?")
            with safe_open(folder / file, framework="pt") as opened:
                self.names |= dict.fromkeys(opened.keys(), file)

    def check(self, module: str, local_names: tuple[str, ...]) -> None:
        """ValueError when a tensor of a packed module is missing (scales of activations may be)."""
        missing = [n for n in local_names if f"{module}.{n}" not in self.names and not n.startswith("input_")]
        if missing:
            raise ValueError(
                f"{module!r} is quantized, but the files in {self.folder} lack its {', '.join(missing)}; if "
                f"transformers merges this weight with others when it saves, add the module to ignore"
            )

    def take(self, module: str, local_names: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of one packed module, by local name; ValueError as :meth:`check`."""
        self.check(module, local_names)
        return {n: self._read(f"{module}.{n}") for n in local_names if f"{module}.{n}" in self.names}

    def rest(self) -> dict[str, Tensor]:
        """All tensors not taken yet."""
        return {name: self._read(name) for name in list(self.names)}

    def _read(self, name: str) -> Tensor:
        with safe_open(self.folder / self.names.pop(name), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when the file is not there."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; is it a folder that save wrote?")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
