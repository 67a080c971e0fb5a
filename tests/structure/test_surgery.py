"""Cuts by hand: tensors, gradients and optimizer states keep the same places; a dense model repeats them."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.structure.surgery import cut_layers, cut_tensors, record_of, reshape


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


KEPT = torch.tensor([0, 2, 5])
CUT = {"0.weight": {0: KEPT}, "0.bias": {0: KEPT}, "2.weight": {1: KEPT}}


def test_the_small_model_computes_what_the_dense_one_does_without_those_neurons():
    model, x = perceptron(), torch.randn(5, 4)
    dense = copy.deepcopy(model)
    cut_tensors(model, CUT)
    hidden = dense[1](dense[0](x))
    removed = [place for place in range(6) if place not in KEPT]
    hidden[:, removed] = 0
    assert_close(model(x), dense[2](hidden))
    assert (model[0].out_features, model[2].in_features) == (3, 3)


def test_gradients_and_momentum_keep_their_places():
    model, x = perceptron(), torch.randn(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    gradient = model[0].weight.grad.clone()
    cut_tensors(model, CUT, [optimizer])
    assert torch.equal(model[0].weight.grad, gradient[KEPT])
    assert torch.equal(optimizer.state[model[2].weight]["exp_avg"], state["2.weight"][:, KEPT])
    assert torch.equal(optimizer.state[model[2].bias]["exp_avg"], state["2.bias"])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_a_dense_model_repeats_the_cuts_and_another_one_is_refused():
    model = perceptron()
    cut_tensors(model, CUT)
    again = perceptron()
    reshape(again, record_of(model))
    again.load_state_dict(model.state_dict())
    assert record_of(again) == record_of(model)
    assert_close(again(torch.ones(1, 4)), model(torch.ones(1, 4)))
    reshape(again, record_of(model))  # nothing is left to repeat
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(2, 4\) in this model and \(3, 4\) in the one"):
        reshape(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), record_of(model))
    cut_layers(other := nn.Sequential(perceptron()), "0", [0, 2])
    with pytest.raises(ValueError, match="this Sequential was shrunk in another way than the model that was saved"):
        reshape(other, record_of(model))


def test_layers_go_with_their_parameters_and_places_are_counted_anew():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})
    for place, layer in enumerate(model["layers"]):
        layer.layer_idx = place
    optimizer, last = torch.optim.SGD(model.parameters(), lr=0.1), model["layers"][3]
    cut_layers(model, "layers", [1, 3], [optimizer])
    assert model["layers"][1] is last
    assert [layer.layer_idx for layer in model["layers"]] == [0, 1]
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert [step["layers"] for step in record_of(model)] == [{"layers": [1, 3]}]


def test_tensors_that_cannot_be_cut_are_named_and_unchanged():
    model = perceptron()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"'0.weight' is parametrized .*prune at set-up"):
        cut_tensors(model, CUT)
    with pytest.raises(ValueError, match="the model has no tensor '7.weight'"):
        cut_tensors(nn.ModuleDict({"7": nn.ReLU()}), {"7.weight": {0: KEPT}})
    assert record_of(model) == []
