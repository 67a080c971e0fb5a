"""Influence of a block and importance of units, by their formulas."""

import torch
from torch import nn

from lightning_compress import compress
from lightning_compress.modifiers.depth import DepthPruningModifier


class Block(nn.Module):
    def __init__(self, width: int, size: float):
        super().__init__()
        self.inner = nn.Linear(width, width)
        nn.init.normal_(self.inner.weight, std=size)

    def forward(self, x):
        return x + self.inner(x)


class Tower(nn.Module):
    """Blocks of growing, then shrinking influence."""

    def __init__(self, sizes=(0.3, 0.001, 0.2, 0.002, 0.4)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(16, size) for size in sizes)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_influence_is_what_the_formula_says_on_calibration_batches():
    model, dense = Tower(), Tower()
    data = [torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ledger = compress(model, DepthPruningModifier(count=1, protect=2), data)
    x, influence = torch.cat(data), []
    for block in dense.blocks:
        y = block(x)
        influence.append(float(1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean()))
        x = y
    (row,) = ledger.rows
    assert (row.module, row.technique, row.scheme, row.params) == ("blocks.2", "depth", "removed", 272)
    assert f"influence {influence[2]:.3g}"[:14] in " ".join(row.flags)
    assert len(model.blocks) == 4
