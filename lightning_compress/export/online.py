"""Rotations that run beside modules: they are in lightning_compress.json, and other loaders must refuse the folder.

transformers 5.23 and compressed-tensors 0.20 read a ``transform_config`` and do not apply it: such a model would load
without an error and compute something else. So, unless it was asked for (transform_config.py), config.json is written
such that they fail: ``quantization_status`` holds a sentence that transformers prints in its error, and
``architectures`` names a class that does not exist.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.export.tensors import naming, read_json
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.rotation.online import OnlineRotations

__all__ = ["online_entries", "read_online", "seal", "unsealed"]

REFUSAL = "online rotations: lightning_compress.load"  # pydantic shortens longer ones
NO_CLASS = "WithOnlineRotations"


def online_entries(model: nn.Module) -> dict[str, Any]:
    """Rotations beside modules that config.json does not state, by name of the module, as plain data."""
    records = {clean_name(name): record for name, (_, record) in OnlineRotations.find(model).items()}
    return {name: record.to_json() for name, record in records.items() if not record.in_config}


def seal(folder: Path) -> None:
    """Change config.json in a folder that is being written so that other loaders refuse it."""
    path = folder / "config.json"
    config = read_json(path)
    config["architectures"] = [name + NO_CLASS for name in config.get("architectures") or [""]]
    dense = {"quant_method": "compressed-tensors", "config_groups": {REFUSAL: []}}
    config["quantization_config"] = config.get("quantization_config", dense) | {"quantization_status": REFUSAL}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unsealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it was before :func:`seal`."""
    config = dict(config)
    config["architectures"] = [name.removesuffix(NO_CLASS) for name in config["architectures"]]
    quantization = dict(config.pop("quantization_config"))
    if REFUSAL in quantization["config_groups"]:  # nothing was quantized
        return config
    return config | {"quantization_config": quantization | {"quantization_status": "compressed"}}


def read_online(layout: nn.Module, entries: Mapping[str, Any], path: Path) -> dict[str, OnlineRotations]:
    """Records from the entries of a file; ValueError names it, and the module that a rotation does not fit."""
    records = {}
    for name, data in entries.items():
        with naming(path, f"online.{name}"):
            R, C = as_matrix(layout.get_submodule(name)).shape
            records[name] = OnlineRotations.from_json(data)
            for rotation in records[name].rotations:
                rotation.apply(torch.zeros(1, C if rotation.side == "input" else R, dtype=torch.float32, device="cpu"))
    return records
