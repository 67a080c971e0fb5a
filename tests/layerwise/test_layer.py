"""Layers by partition and by rows, and their solutions put together again."""

import pytest
import torch
from torch import nn

from lightning_compress.layerwise.layer import Layer, Solved


def test_parts_are_the_rows_of_each_partition():
    module = nn.Conv1d(6, 12, 3, groups=3)
    layer = Layer("conv", module, module.weight.detach().flatten(1))
    assert layer.parts(1) == [layer]
    parts = layer.parts(3)
    assert [part.rows for part in parts] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert torch.equal(torch.cat([part.W_RC for part in parts]), layer.W_RC)
    assert {part.module for part in parts} == {module}


def test_solutions_are_joined_row_by_row():
    each = [
        Solved(torch.full((2, 3), float(i)), 1.0 + i, 10.0, flag, {"scale": torch.full((2, 1), float(i)), "zero": None})
        for i, flag in enumerate(["dead", None, "dead"])
    ]
    whole = Solved.join(each)
    assert whole.W_RC[:, 0].tolist() == whole.parts["scale"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert (whole.error, whole.energy, whole.flag, whole.parts["zero"]) == (6.0, 30.0, "dead", None)
    assert whole.relative_error == pytest.approx(0.2)
    assert Solved.join(each[:1]) is each[0]


def test_an_unknown_error_stays_unknown():
    each = [Solved(torch.zeros(1, 1), 1.0), Solved(torch.zeros(1, 1))]
    assert Solved.join(each).relative_error is None
    assert Solved(torch.zeros(1, 1), -1e-9, 0.0).relative_error == 0.0  # rounding
