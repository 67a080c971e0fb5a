"""Launches of the kernel: tile, warps, stages, split of tokens; from the table of a GPU (launch.json), or by a rule.

Shapes: N tokens, C columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from lightning_compress.ops.launches import LaunchTable

__all__ = ["TABLE", "HessianLaunch", "candidates", "choose", "rule", "shape", "tiles"]


@dataclass(frozen=True)
class HessianLaunch:
    """Tile of block_i rows and block_j columns of H, block_n tokens at a time."""

    block_i: int
    block_j: int
    block_n: int
    split: int
    warps: int
    stages: int
    descriptors: bool


TABLE = LaunchTable(
    Path(__file__).with_suffix(".json"), HessianLaunch, exact=("C", "dtype", "descriptors"), at_most="N"
)


def choose(N: int, C: int, dtype: torch.dtype, device: torch.device, aligned: bool) -> HessianLaunch:
    """The launch for this shape on this device; ``aligned``: tensor descriptors of X and H are possible."""
    properties = torch.cuda.get_device_properties(device)
    descriptors = aligned and properties.major >= 9
    measured = TABLE.find(properties.name, shape(N, C, dtype, descriptors))
    return measured or rule(N, C, properties.multi_processor_count, descriptors)


def shape(N: int, C: int, dtype: torch.dtype, descriptors: bool) -> dict[str, int | str | bool]:
    """The shape under the names of the table."""
    return {"N": N, "C": C, "dtype": str(dtype).removeprefix("torch."), "descriptors": descriptors}


def rule(N: int, C: int, processors: int, descriptors: bool) -> HessianLaunch:
    """Wide tiles where they fill the processors, tokens split where even small ones do not; not measured yet."""
    descriptors = descriptors and tiles(C, 128, 256) >= processors
    block_j = 256 if descriptors else 128
    split = 1
    while tiles(C, 128, block_j) * split < processors and 2 * split * 512 <= N:  # at least 512 tokens for each split
        split *= 2
    return HessianLaunch(128, block_j, 64, split, warps=8, stages=4 if descriptors else 3, descriptors=descriptors)


def candidates(N: int, C: int, processors: int, descriptors: bool) -> Iterator[HessianLaunch]:
    """The launches that the tuner tries, the rule's launch first."""
    first = rule(N, C, processors, descriptors)
    yield first
    splits = [1 << i for i in range(8) if 2 << i <= max(2, N // 256)]
    for block_j, block_n, warps, stages, by_descriptors in product(
        (128, 256), (32, 64, 128), (4, 8), (2, 3, 4), {False, descriptors}
    ):
        for split in [1] if by_descriptors else splits:  # sums of splits are added by pointers
            launch = HessianLaunch(128, block_j, block_n, split, warps, stages, by_descriptors)
            if launch != first and (split == 1 or tiles(C, 128, block_j) * split <= 4 * processors):
                yield launch


def tiles(C: int, block_i: int, block_j: int) -> int:
    """Number of programs that cover the triangle; the last few may lie below H and do nothing."""
    ratio = block_j // block_i
    rows = -(-C // block_i)
    pairs = -(-rows // ratio)
    return ratio * pairs * (pairs + 1) // 2
