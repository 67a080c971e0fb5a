"""Launches of the kernel: tile, warps, stages, pieces of tiles; from the table of a GPU (launch.json), or by a rule.

A processor has one tile at a time, so that T tiles take ceil(T / P) waves on P processors. Tiles of the last wave,
where it is not full, are computed in pieces of the tokens.

Shapes: N tokens, C columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from lightning_compress.ops.launches import LaunchTable

__all__ = ["TABLE", "HessianLaunch", "candidates", "choose", "rule", "shape", "tiles"]

SHORTEST = 512  # tokens of a piece at least
MOST_PIECES = 32  # of a tile: their sums are written and read, 64 KB each
WIDE_GAIN = 1.1  # tiles of 128 x 256 read a quarter less than two of 128 x 128; an estimate


@dataclass(frozen=True)
class HessianLaunch:
    """Tile of block_i rows and block_j columns of H, block_n tokens at a time; the last ``tail`` tiles in pieces."""

    block_i: int
    block_j: int
    block_n: int
    tail: int
    pieces: int
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
    return measured or rule(N, C, properties.multi_processor_count, descriptors, wide=properties.major == 9)


def shape(N: int, C: int, dtype: torch.dtype, descriptors: bool) -> dict[str, int | str | bool]:
    """The shape under the names of the table."""
    return {"N": N, "C": C, "dtype": str(dtype).removeprefix("torch."), "descriptors": descriptors}


def rule(N: int, C: int, processors: int, descriptors: bool, wide: bool = True) -> HessianLaunch:
    """Wide tiles if descriptors load them and they fill as many waves; not measured yet.

    ``wide``: wide tiles are possible. On sm_100 their float64 sums spill registers.
    """
    tail, pieces, waves = cut(N, tiles(C, 128, 128), processors)
    if descriptors and wide:
        wide_tail, wide_pieces, wide_waves = cut(N, tiles(C, 128, 256), processors)
        if 2 * wide_waves <= WIDE_GAIN * waves:
            return HessianLaunch(128, 256, 64, wide_tail, wide_pieces, warps=8, stages=4, descriptors=True)
    return HessianLaunch(128, 128, 64, tail, pieces, warps=8, stages=4 if descriptors else 3, descriptors=descriptors)


def cut(N: int, count: int, processors: int) -> tuple[int, int, float]:
    """Number of tiles in the last wave, the pieces of each, and how many waves that takes in all."""
    tail = count % processors
    if not tail:
        return 1, 1, count / processors
    most = max(1, min(N // SHORTEST, MOST_PIECES))
    pieces = min(range(1, most + 1), key=lambda p: (-(-tail * p // processors) / p, p))
    return tail, pieces, count // processors + -(-tail * pieces // processors) / pieces


def candidates(N: int, C: int, processors: int, descriptors: bool) -> Iterator[HessianLaunch]:
    """The launches that the tuner tries, the rule's launch first."""
    first = rule(N, C, processors, descriptors)
    yield first
    for block_j, block_n, warps, stages, by_descriptors in product(
        (128, 256), (32, 64, 128), (4, 8), (2, 3, 4), {False, descriptors}
    ):
        for tail, pieces in {(1, 1), cut(N, tiles(C, 128, block_j), processors)[:2]}:
            launch = HessianLaunch(128, block_j, block_n, tail, pieces, warps, stages, by_descriptors)
            if launch != first:
                yield launch


def tiles(C: int, block_i: int, block_j: int) -> int:
    """Number of programs that cover the triangle; the last few may lie below H and do nothing."""
    ratio = block_j // block_i
    rows = -(-C // block_i)
    pairs = -(-rows // ratio)
    return ratio * pairs * (pairs + 1) // 2
