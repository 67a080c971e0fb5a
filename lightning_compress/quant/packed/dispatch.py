"""When a dense product takes less time than a packed one on a CPU: a rule by shape, from measured constants.

    t = call + weight N K + value M (N + K) + product M N K         microseconds; the last three per million

A rule, not a stopwatch: two loads of one folder must compute the same bits, whatever else the machine does meanwhile.

Shapes: M tokens, N output features, K input features; of a convolution places, channels out, channels in times kernel.
"""

from typing import NamedTuple

import torch

__all__ = ["DISPATCHES", "MANY", "check_dispatch", "is_dense_faster"]

DISPATCHES = ("packed", "fastest")
MANY = 256
"""Tokens of the call that decides whether a layer is ever packed: with more, products of its shape gain little more."""
MARGIN = 0.9  # of the dense time that the packed one may take: the rule is right to about 20 %
PLAIN = 16**3  # up to this M N K torch does not call oneDNN for bf16, which costs 12 us


class Cost(NamedTuple):
    call: float
    weight: float
    value: float
    product: float


# one thread of an AMD EPYC (Zen 5) with AVX-512 and VNNI, torch 2.13, 2026-12-01; weights of a float32 Linear come
# from memory (110), as in a whole model, not from the cache (50)
DENSE = {
    "linear": {torch.float32: Cost(4, 110, 0, 21), torch.bfloat16: Cost(15, 90, 0, 5)},
    "convolution": {torch.float32: Cost(20, 0, 0, 10)},
}
PACKED = {
    "qlinear": Cost(33, 30, 800, 2.5),
    "_weight_int4pack_mm_for_cpu": Cost(10.5, 22, 0, 12.4),
    "_weight_int8pack_mm": Cost(10, 25, 0, 13.5),
    "qconv": Cost(60, 0, 1000, 2.5),  # its values are those of the input and output, not of the windows
}


def is_dense_faster(name: str, dtype: torch.dtype, M: int, N: int, K: int, values: int | None = None) -> bool:
    """Whether to compute densely what a packed product of this name would compute.

    Args:
        name: Of the backend, or ``qconv``.
        dtype: That of the result.
        M: Tokens.
        N: Output features.
        K: Input features.
        values: Numbers in and out, if not M (N + K).
    """
    dense, packed = DENSE["convolution" if name == "qconv" else "linear"].get(dtype), PACKED.get(name)
    if dense is None or packed is None:
        return False
    if dtype == torch.bfloat16 and M * N * K <= PLAIN:
        return True
    both = (N * K / 1e6, (M * (N + K) if values is None else values) / 1e6, M * N * K / 1e6)
    times = [c.call + c.weight * both[0] + c.value * both[1] + c.product * both[2] for c in (packed, dense)]
    return times[0] > MARGIN * times[1]


def check_dispatch(dispatch: str, packed: bool | None) -> None:
    """ValueError unless it is one of DISPATCHES, and has modules to choose for: ``packed=False`` rounds all inputs."""
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch must be one of {', '.join(DISPATCHES)}, got {dispatch!r}")
    if dispatch == "fastest" and packed is False:
        raise ValueError(
            "dispatch='fastest' chooses between packed and dense products, and nothing is packed with packed=False, or "
            "with rotations that run beside modules; leave dispatch out"
        )
