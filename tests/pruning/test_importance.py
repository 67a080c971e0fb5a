"""Influence of a block and importance of units, by their formulas."""

import torch

from lightning_compress import compress
from lightning_compress.modifiers.depth import DepthPruningModifier
from tests.support.structure_runs import Tower


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
