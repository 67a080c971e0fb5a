"""How OWL spreads sparsity over layers."""

import pytest
import torch
from torch import nn

from lightning_compress.layerwise.owl import OutlierSurvey, allocate, outlier_share


def test_the_share_of_outliers():
    scores = [torch.ones(10, 9), torch.tensor([[100.0] * 3 + [1.0] * 7])]
    assert outlier_share(scores, 5.0) == pytest.approx(3 / 100)  # the mean is 3.97
    assert outlier_share(scores, 40.0) == 0.0
    assert outlier_share([2 * s for s in scores], 5.0) == outlier_share(scores, 5.0)


def test_more_outliers_keep_more_weights_and_the_total_is_what_was_asked_for():
    shares, sizes = {"a": 0.01, "b": 0.05, "c": 0.02}, {"a": 100, "b": 300, "c": 50}
    found = allocate(shares, sizes, 0.7, 0.08)
    assert found["b"] < found["c"] < found["a"]
    assert found["a"] - found["b"] == pytest.approx(0.16)
    assert sum(found[n] * sizes[n] for n in sizes) / 450 == pytest.approx(0.7)


def test_equal_layers_get_equal_shares():
    assert allocate({"a": 0.1, "b": 0.1}, {"a": 1, "b": 5}, 0.6, 0.08) == {"a": 0.6, "b": 0.6}
    assert allocate({"a": 0.1}, {"a": 1}, 0.6, 0.08) == {"a": 0.6}


def test_targets_of_a_layer_are_looked_at_together_and_those_outside_by_themselves():
    torch.manual_seed(0)
    modules = {name: nn.Linear(16, 8, bias=False) for name in ("q", "k", "x", "y", "spare")}
    survey, data = OutlierSurvey(modules, 3.0), {name: torch.randn(40, 16) for name in "qkxy"}
    data["k"][:, 3] *= 50
    data["y"][:, :2] *= 20
    for name, x in data.items():
        for piece in x.split([7, 33]):
            survey.observe(name, piece[None])
    survey.close("block", ["q", "k", "spare"])
    survey.close("", ["x", "y"])
    found = survey.sparsities(0.5, 0.1)
    assert list(found) == ["q", "k", "x", "y"]
    assert found["q"] == found["k"]
    assert len({found["q"], found["x"], found["y"]}) == 3
    score = {n: modules[n].weight.detach().abs() * data[n].square().mean(0).sqrt() for n in data}
    layers = {"block": [score["q"], score["k"]], "x": [score["x"]], "y": [score["y"]]}
    shares = {layer: outlier_share(scores, 3.0) for layer, scores in layers.items()}
    expected = allocate(shares, {"block": 256, "x": 128, "y": 128}, 0.5, 0.1)
    assert [found[n] for n in "qxy"] == pytest.approx([expected[n] for n in ("block", "x", "y")])
