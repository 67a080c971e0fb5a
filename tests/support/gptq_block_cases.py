"""Blocks of GPTQ's columns for the tests of the op, of every kind of grid."""

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block import Grid, Rounding

GRIDS: dict[str, Grid | None] = {
    "int4": Grid(-8, 7),
    "int3 bf16": Grid(-4, 3, 0, torch.bfloat16),
    "int8 fp16": Grid(-128, 127, 0, torch.float16),
    "E4M3 bf16": Grid(-448, 448, 8, torch.bfloat16),
    "E2M1 microscaled": Grid(-6, 6, 4, torch.float32, True),
    "E2M3 fp16": Grid(-7.5, 7.5, 6, torch.float16),
    "none": None,
}


def block(b: int, R: int, grid: Grid | None, *, zero: bool = False, keep: bool = False, seed: int = 0) -> tuple:
    """A, W, U, rounding and mask; groups of columns out of order, as with activation order."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    W, U = normal(b, R) * 0.05, normal(b, b) / b**0.5
    A, G = W + 0.01 * normal(b, R), 3
    U[torch.ones(b, b).tril().bool()] = torch.nan  # the op does not read it
    mask = torch.rand(b, R, generator=random) > 0.4 if keep else None
    if grid is None:
        return A, W, U, None, mask
    largest = min(grid.high, 100.0)
    scale = (torch.rand(G, R, generator=random) + 0.5) * 0.15 / largest
    points = torch.randint(-3, 4, (G, R), generator=random).float() if zero else None
    return A, W, U, Rounding(grid, scale, points, torch.randint(0, G, (b,), generator=random)), mask
