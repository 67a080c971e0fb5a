"""How the kernel is launched: tile, warps, stages and split of k; from the table of a GPU, else by a rule.

launch.json holds what was measured: {GPU name: [{"M": at most so many tokens, "N": .., "K": .., fields of Launch}]},
smallest M first. It is empty until a GPU has been measured.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Launch", "choose", "rule"]


@dataclass(frozen=True)
class Launch:
    """Tile of block_m tokens and block_n features; ``scale_sums``: scales after the dot, not in the weight."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    scale_sums: bool


def choose(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch for this shape on this device."""
    if device.type != "cuda":
        return rule(M, N, K, dtype, processors=1)
    properties = torch.cuda.get_device_properties(device)
    for entry in _table().get(properties.name, []):
        if (entry["N"], entry["K"]) == (N, K) and entry["M"] >= M and dtype != torch.float32:
            return Launch(**{key: value for key, value in entry.items() if key not in ("M", "N", "K")})
    return rule(M, N, K, dtype, processors=properties.multi_processor_count)


def rule(M: int, N: int, K: int, dtype: torch.dtype, processors: int) -> Launch:
    """Small tiles while memory bounds the product, k split until every processor has a tile; not measured yet."""
    few = M <= 64 or dtype == torch.float32
    block_m = min(max(16, 1 << (M - 1).bit_length()), 32 if dtype == torch.float32 else 64 if few else 128)
    block_n = 64 if few else 128
    tiles = -(-M // block_m) * -(-N // block_n)
    blocks = -(-K // 128)
    split = 1
    while tiles * split < processors and blocks >= 2 * split * 8:      # each part keeps 8 blocks of 128 columns
        split *= 2
    scale_sums = dtype == torch.float32 or M <= 32
    return Launch(block_m, block_n, split, warps=4 if few else 8, stages=3, scale_sums=scale_sums)


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return table
