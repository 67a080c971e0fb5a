"""Sparsities by the loss: the cheapest columns of all layers, and costs against gradients that autograd gives."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from lightning_compress import WandaPruningModifier, compress
from lightning_compress.calibration.gradient_survey import sampled_loss
from lightning_compress.layerwise.loss_shares import LossSurvey, cheapest
from tests.layerwise.test_token_weights import Classifier, batches
from tests.modifiers.tune.test_modifier import ids, llama


def test_no_other_allocation_within_the_bounds_costs_less():
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 2, "b": 3, "c": 1}
    scale = {"a": 1.0, "b": 0.2, "c": 5.0}
    costs = {n: (scale[n] * torch.rand(8, generator=generator, dtype=torch.float64)).sort().values for n in sizes}
    shares = cheapest(costs, sizes, 0.5, 0.25)
    assert all(0.25 <= share <= 0.75 for share in shares.values())

    def cost(counts):
        return sum(float(costs[n][:k].sum()) for n, k in counts.items())

    def zeros(counts):
        return sum(k * sizes[n] for n, k in counts.items())

    counts = {n: round(share * 8) for n, share in shares.items()}
    assert zeros(counts) == 24
    others = [dict(zip(sizes, combination, strict=True)) for combination in product(range(2, 7), repeat=3)]
    assert cost(counts) == pytest.approx(min(cost(other) for other in others if zeros(other) == 24))


def test_equal_costs_and_no_freedom_give_equal_shares():
    costs = {"a": torch.ones(8, dtype=torch.float64), "b": torch.ones(8, dtype=torch.float64)}
    assert cheapest(costs, {"a": 4, "b": 4}, 0.5, 0.0) == {"a": 0.5, "b": 0.5}
    narrow = {"a": torch.ones(3, dtype=torch.float64)}  # no number of columns lies within the bounds
    assert cheapest(narrow, {"a": 4}, 0.5, 0.1) == {"a": pytest.approx(1 / 3)}


def test_costs_are_those_of_gradients_of_outputs(monkeypatch):
    """The first layers of the walk see dense inputs: sum over rows of W^2 sum_t |g_t|^2 x_t^2 / R, sorted by row."""
    torch.manual_seed(0)
    model, costs = Classifier(), {}
    reference = copy.deepcopy(model)
    monkeypatch.setattr(LossSurvey, "sparsities", lambda self, *args: costs.update(self._costs) or {})
    compress(model, WandaPruningModifier(sparsity_profile="loss", targets=["Linear"]), batches(), walk="whole")
    sums = dict.fromkeys(("q", "k", "head"), 0)
    for number, x in enumerate(batches()):
        hidden = reference.convolution(x).mT.tanh()
        outputs = {name: getattr(reference, name)(hidden) for name in "qk"}
        both = torch.cat(list(outputs.values()), -1).tanh()
        outputs["head"] = reference.head(both)
        loss = sampled_loss(outputs["head"], "classes", None, number)
        gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
        for name, value in (("q", hidden), ("k", hidden), ("head", both)):
            w = gradients[name].square().sum(-1, keepdim=True)
            sums[name] = sums[name] + (w * value.square()).flatten(0, -2).sum(0).detach()
    for name, fisher in sums.items():
        W = getattr(reference, name).weight.detach()
        expected = (W.square() * fisher / len(W)).sort(dim=1).values.sum(0)
        torch.testing.assert_close(costs[name].float(), expected, rtol=1e-4, atol=1e-7)


def test_the_whole_model_has_the_sparsity_that_was_asked_for():
    ledger = compress(llama(), WandaPruningModifier(sparsity=0.6, ignore=["lm_head"], sparsity_profile="loss"), ids())
    zeros = sum(row.sparsity * row.params for row in ledger.rows)
    assert 0.595 < zeros / sum(row.params for row in ledger.rows) <= 0.6
    shares = [row.sparsity for row in ledger.rows]
    assert 0.52 <= min(shares) < max(shares) <= 0.68


def test_inplace_activations_and_grouped_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    pruner = WandaPruningModifier(targets=["Conv2d", "Linear"], sparsity_profile="loss", objective="loss")
    ledger = compress(model, pruner, [torch.randn(4, 3, 8, 8) for _ in range(2)])
    assert len({row.sparsity for row in ledger.rows}) > 1
