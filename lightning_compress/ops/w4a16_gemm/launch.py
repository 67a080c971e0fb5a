"""Launches of the kernel: tile, warps, stages, split of k; from the table of a GPU (launch.json), or by a rule.

Shapes: M tokens, N output features, K input features, groups of ``group`` columns (K: one scale per row).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from lightning_compress.ops.launches import LaunchTable

__all__ = ["TABLE", "W4Launch", "candidates", "choose", "rule", "shape"]

PROGRAMS = 2.5  # a block takes a program some 650 clocks; memory brings its 4 KB to a processor of an H200 in 249
SHARED = 227 << 10  # bytes of shared memory of a processor of an H200


@dataclass(frozen=True)
class W4Launch:
    """Tile of block_m tokens and block_n features; ``scale_sums``: scales after the dot, not in the weight."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    scale_sums: bool


TABLE = LaunchTable(Path(__file__).with_suffix(".json"), W4Launch, exact=("N", "K", "group", "dtype"), at_most="M")


def choose(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, group: int = 128) -> W4Launch:
    """The launch for this shape on this device."""
    if device.type != "cuda":
        return rule(M, N, K, dtype, processors=1)
    properties = torch.cuda.get_device_properties(device)
    measured = TABLE.find(properties.name, shape(M, N, K, dtype, group))
    return measured or rule(M, N, K, dtype, processors=properties.multi_processor_count)


def shape(M: int, N: int, K: int, dtype: torch.dtype, group: int) -> dict[str, int | str]:
    """The shape under the names of the table."""
    return {"M": M, "N": N, "K": K, "group": group, "dtype": str(dtype).removeprefix("torch.")}


def rule(M: int, N: int, K: int, dtype: torch.dtype, processors: int) -> W4Launch:
    """Small tiles and many stages while memory bounds the product; not measured yet."""
    few = M <= 64 or dtype == torch.float32
    block_m = min(max(16, 1 << (M - 1).bit_length()), 32 if dtype == torch.float32 else 64 if few else 128)
    block_n = 64 if few else 128
    stages = 3 if dtype == torch.float32 or not few else 6 if block_m <= 32 else 5
    stage = 64 * block_n + 128 * block_m * dtype.itemsize  # bytes: words, tokens
    split = _split(-(-M // block_m) * -(-N // block_n), -(-K // 128), processors, max(1, SHARED // (stages * stage)))
    return W4Launch(block_m, block_n, split, warps=4 if few else 8, stages=stages, scale_sums=few)


def _split(tiles: int, blocks: int, processors: int, resident: int) -> int:
    """The split of k that gives each processor ``PROGRAMS``, all at once, then the most even one, then the smallest.

    A program has at least 4 blocks of 128 columns.
    """

    def merit(split: int) -> tuple[float, float, int]:
        programs = tiles * split / processors
        return min(programs, PROGRAMS), round(programs / math.ceil(programs), 2), -split

    splits = [1 << i for i in range(5) if blocks >= 4 << i and tiles << i <= resident * processors]
    return max(splits or [1], key=merit)


def candidates(M: int, N: int, K: int, dtype: torch.dtype, processors: int) -> Iterator[W4Launch]:
    """The launches that the tuner tries, the rule's first: tiles of about M tokens, up to four tiles per processor."""
    yield rule(M, N, K, dtype, processors)
    rows = min(max(16, 1 << (M - 1).bit_length()), 128)
    blocks = -(-K // 128)
    splits = [1 << i for i in range(5) if blocks >= 4 << i]
    for block_m, block_n, warps, stages, scale_sums in product(
        sorted({rows, max(16, rows // 2)}), (64, 128), (4, 8), (2, 3, 4, 5, 6, 8), (True, False)
    ):
        tiles = -(-M // block_m) * -(-N // block_n)
        for split in splits or [1]:
            launch = W4Launch(block_m, block_n, split, warps, stages, scale_sums)
            if (split == 1 or tiles * split <= 4 * processors) and launch != rule(M, N, K, dtype, processors):
                yield launch
