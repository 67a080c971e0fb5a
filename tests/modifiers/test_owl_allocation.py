"""OWL through the whole walk: allocated from the dense model, before any of it is pruned."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import GPTQModifier, SparseGPTModifier, WandaPruningModifier, compress
from lightning_compress.layerwise.owl import allocate, outlier_share
from tests.support.quantization_runs import correlated


def network() -> nn.Sequential:
    """Four blocks; the first one's inputs have outlier columns."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)]
    return nn.Sequential(*blocks)


def data() -> list[torch.Tensor]:
    return [correlated(64, 32, i) for i in range(3)]


def expected(model: nn.Sequential, sparsity: float) -> list[float]:
    """The paper's arithmetic on the dense model's activations."""
    x, shares = torch.cat(data()), {}
    with torch.no_grad():
        for i, block in enumerate(model):
            hidden = block[1](block[0](x))
            inputs = [(block[0].weight, x), (block[2].weight, hidden)]
            scores = [W.abs() * z.square().mean(0).sqrt() for W, z in inputs]
            shares[str(i)] = outlier_share(scores, 5.0)
            x = block(x)
    return list(allocate(shares, dict.fromkeys(shares, 4096), sparsity, 0.08).values())


def zeros(model: nn.Sequential) -> list[float]:
    return [sum(int((linear.weight == 0).sum()) for linear in block[::2]) / 4096 for block in model]


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
@pytest.mark.parametrize("pruner", [SparseGPTModifier, WandaPruningModifier])
def test_blocks_with_outliers_keep_more(pruner, walk):
    model = network()
    wanted = expected(model, 0.6)
    compress(model, pruner(sparsity=0.6, sparsity_profile="owl"), data(), walk=walk)
    found = zeros(model)
    assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=0.02)  # Wanda: whole weights of a row
    assert min(found) == found[0]
    assert sum(found) / 4 == pytest.approx(0.6, abs=0.02)
    assert max(found) - min(found) == pytest.approx(0.16, abs=0.02)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_modifiers_see_nothing_of_the_survey():
    model = network()
    ledger = compress(
        model, [SparseGPTModifier(sparsity_profile="owl"), GPTQModifier(scheme="W4A16", group_size=32)], data()
    )
    assert {row.tokens for row in ledger} == {192}
    assert sum(zeros(model)) / 4 >= 0.499


def test_without_blocks_each_target_is_a_layer():
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 48))
    compress(model, SparseGPTModifier(sparsity_profile="owl", sparsity=0.7), data())
    counts = [int((m.weight == 0).sum()) for m in (model[0], model[2])]
    assert sum(counts) == pytest.approx(0.7 * (512 + 768), abs=2)
