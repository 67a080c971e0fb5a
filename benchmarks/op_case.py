"""What bench_ops.py needs of an op: shapes, their minimal cost, the op itself, and contestants.

A case is made from a seed, once for each rotating buffer. Inputs of contestants (packed or dense weights) are made
before the timed calls, at the first call at the latest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LLAMA", "Call", "Case", "Trial"]

LLAMA = ((4096, 4096), (8192, 8192), (6144, 4096), (28672, 4096), (4096, 14336), (28672, 8192))  # N, K

Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass
class Trial:
    """One set of buffers. All calls compute the same; ``exact`` in float64, from the same numbers.

    Args:
        ours: The op.
        contestants: By name. One that needs a wheel imports it at its first call; what it raises is reported.
        exact: Slow, and needs memory.
        part: What of each result counts, of which the norm is taken.
    """

    ours: Call
    contestants: dict[str, Call]
    exact: Call
    part: Callable[[Tensor], Tensor] = torch.flatten


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: Folder under ops/.
        shape: As in the table.
        moved: Bytes that memory moves at least.
        flop: Of the cheapest way to the result.
        tolerance: Of the relative error (Frobenius norm) against ``Trial.exact``.
        make: (device, dtype, seed) -> Trial.
        dtype: Of the inputs.
        sizes: By letter (M, N, K ...), for the table of goals.
    """

    op: str
    shape: str
    moved: int
    flop: int
    tolerance: float
    make: Callable[[torch.device, torch.dtype, int], Trial] = field(repr=False)
    dtype: torch.dtype = torch.bfloat16
    sizes: Mapping[str, int] = field(default_factory=dict)
