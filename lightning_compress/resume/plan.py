"""What a log belongs to: recipe, model, data, walk and machine, as fingerprints; and what differs between two of them.

Results are equal bit for bit where all of it is equal. The number of processes is not in it.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Modifier
from lightning_compress.core.precision import matmul_precision
from lightning_compress.files.atomic_file import whole_file
from lightning_compress.files.bounded_json import read_bounded_json
from lightning_compress.layers.sharded import full
from lightning_compress.quant.module_state import dense_tensors
from lightning_compress.recipe import dump_recipe, recipe_difference
from lightning_compress.team import Team

__all__ = ["FORMAT_VERSION", "batch_digest", "batch_digests", "difference", "json_digest", "make_plan",
           "model_digests", "read_plan", "tensor_digest", "write_plan"]  # fmt: skip

FORMAT_VERSION = 1
PLAN_BYTES = 2**27
LIBRARIES = ("torch", "compressed_tensors", "transformers", "numpy", "triton")

Plan = dict[str, Any]


def batch_digests(batches: Sequence[Any], owners: Team, team: Team) -> list[str]:
    """:func:`batch_digest` of each batch, on every rank.

    Args:
        batches: Calibration batches; in the place of those that another rank has anything may be.
        owners: The ranks that share them.
        team: The ranks that get the result.
    """
    by_number = {number: batch_digest(batches[number]) for number in owners.mine(len(batches))}
    merged = {number: digest for each in team.gather(by_number) for number, digest in each.items()}
    return [merged[number] for number in range(len(batches))]


def model_digests(model: nn.Module, *, hashed: bool = True) -> dict[str, str]:
    """:func:`tensor_digest` of all parameters and buffers by name.

    Args:
        model: The model. Where ranks hold shards of it, all of them call this.
        hashed: False: only take part, for a rank that does not need the result.
    """
    digests = {}
    for name, module in model.named_modules():
        for key, tensor in dense_tensors({name: module}).items():
            values = full(tensor)
            if hashed:
                digests[key] = tensor_digest(values)
    return digests


def make_plan(
    modifiers: Sequence[Modifier],
    model: nn.Module,
    digests: Mapping[str, str],
    batches: Sequence[str],
    blocks: Sequence[str],
    options: CalibrationOptions,
) -> Plan:
    """The plan of a calibration that is about to begin, in JSON types.

    Args:
        modifiers: The recipe.
        model: With its dense weights.
        digests: :func:`model_digests` of it.
        batches: :func:`batch_digest` of each batch, of all processes.
        blocks: Names of the model's blocks.
        options: How calibration goes through the model.
    """
    devices = sorted({str(p.device.type) for p in model.parameters()} | {torch.device(options.device or "cpu").type})
    return {
        "format_version": FORMAT_VERSION,
        "recipe": dump_recipe(modifiers),
        "model": {"class": type(model).__name__, **digests},
        "batches": list(batches),
        "walk": {
            "walk": options.walk, "blocks": list(blocks), "seed": options.seed, "devices": devices,
            "moe_calibrate_all_experts": options.moe_calibrate_all_experts, "memory_limit": options.memory_limit,
        },
        "versions": {
            "python": platform.python_version(), "lightning_compress": version("lightning_compress"),
            **{name: version(name) for name in LIBRARIES if name in sys.modules},
        },
        "machine": {
            "type": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "matmul_precision": matmul_precision(),
            "autocast": [torch.is_autocast_enabled(device) for device in devices],
            "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        },
    }  # fmt: skip


def difference(before: Plan, now: Plan) -> str:
    """What differs, in one line; empty where nothing does."""
    if lines := recipe_difference(before["recipe"], now["recipe"]):
        return f"the recipe: {'; '.join(lines[:3])}"
    old, new = before["model"], now["model"]
    if names := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        was, now_is = (plan.get(names[0], "absent") for plan in (old, new))
        return f"the model: {len(names)} entries, such as {names[0]} ({was}, now {now_is})"
    old_batches, new_batches = before["batches"], now["batches"]
    if len(old_batches) != len(new_batches):
        return f"the data: {len(old_batches)} calibration batches, now {len(new_batches)}"
    if numbers := [i for i, pair in enumerate(zip(old_batches, new_batches, strict=True)) if pair[0] != pair[1]]:
        return (
            f"the data: {len(numbers)} of {len(new_batches)} calibration batches, the first one is number {numbers[0]}"
        )
    for part in ("walk", "versions", "machine"):
        if lines := recipe_difference(before[part], now[part]):
            return f"the {part}: {'; '.join(lines[:3])}"
    return ""


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan with its checksum, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(f"{json.dumps(plan | {'checksum': json_digest(plan)})}\n", encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """The plan in a file; OSError or ValueError where it is missing, or is not one of this format."""
    plan = read_bounded_json(path, PLAN_BYTES)
    checksum = plan.pop("checksum", None) if isinstance(plan, dict) else None
    if checksum is None or plan.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a plan of format_version {FORMAT_VERSION}")
    if checksum != json_digest(plan):
        raise ValueError(f"{path} was changed after it was written: its checksum is another one")
    assert isinstance(plan, dict)
    return plan


def json_digest(value: Any) -> str:
    """sha256 of a value in JSON types, which does not change when it is written and read."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """dtype, shape and sha256 of the values."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    checksum = hashlib.sha256(flat.numpy().data).hexdigest()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} sha256 {checksum}"


def batch_digest(batch: Any) -> str:
    """sha256 of all tensors and plain values in a batch; of other objects their attributes count."""
    checksum = hashlib.sha256()
    for text in _leaves(batch):
        checksum.update(f"{text}\n".encode())
    return checksum.hexdigest()


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Tensor):
        return [tensor_digest(value)]
    if isinstance(value, Mapping):
        return [leaf for key in value for leaf in (repr(key), *_leaves(value[key]))]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(leaf for item in value for leaf in _leaves(item))]
    if isinstance(value, str | bytes | int | float | bool | None):
        return [repr(value)]
    return [type(value).__name__, *_leaves(vars(value) if hasattr(value, "__dict__") else {})]
