"""Sign descent: never worse than where it begins, one order of batches for one seed."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.descent import Descent, descend, drawn
from lightning_compress.modifiers.autoround.grid import LearnedGrid
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.schemes import from_groups
from tests.support.quantization_runs import correlated


def lone(seed: int = 0) -> tuple[LearnedBlock, LearnedGrid, Tensor]:
    """One layer, its inputs, its learned grid."""
    layer = nn.Linear(16, 8)
    layer.weight.data = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    data = [correlated(20, 16, i) for i in range(4)]
    block = LearnedBlock({"fc": layer}, lambda i: layer(data[i]), lambda: None, 4, None)
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 8}}})[0].weights
    return block, LearnedGrid(as_matrix(layer).clone(), *find_scales(as_matrix(layer), args, "minmax"), args), layer


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.005, 0.5, 50.0])
def test_the_result_is_never_worse_than_iterate_0(rate):
    block, grid, layer = lone()
    with block.learning(layer, {}):
        result = descend({"fc": grid}, block, Descent(30, rate, 20, seed=0))
    assert result.ended <= result.began
    assert_close(sum(float(block.error(i)) for i in range(4)), result.ended)
    assert torch.equal(as_matrix(layer), result.weights["fc"].value())


@torch.no_grad()
def test_nor_than_the_others():
    block, grid, layer = lone()
    good = grid.now()
    bad = LearnedGrid(grid.W_RC, grid.scale * 5, None, grid.args)
    with block.learning(layer, {}):
        result = descend({"fc": bad}, block, Descent(2, 1e-3, 20, seed=0), [{"fc": good}])
    assert result.weights["fc"] is good


def test_every_batch_comes_as_often_as_any_other_and_a_seed_is_an_order():
    order = [next(it) for it in [drawn(5, 3)] for _ in range(20)]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert order == [next(it) for it in [drawn(5, 3)] for _ in range(20)]
    assert order != [next(it) for it in [drawn(5, 4)] for _ in range(20)]
