"""Channels are followed through any network."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.structure_runs import images, initialized, llama, perceptron, residuals, silenced


def test_channels_are_followed_through_residuals_and_norms():
    model, dense = residuals().eval(), residuals().eval()
    modifier = StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[1, 8, 8])
    initialized(model, modifier)
    assert model.stem.weight.shape == (4, 1, 3, 3)
    assert model.first.bn1.num_features == len(model.first.bn1.running_var) == 4
    assert (model.depthwise.groups, model.depthwise.in_channels) == (4, 4)
    assert (model.head.in_features, model.head.out_features) == (16, 10)
    weakest = {}
    for name in ("first", "second"):
        block = dense.get_submodule(name)
        score = block.conv1.weight.square().sum((1, 2, 3)) + block.conv2.weight.square().sum((0, 2, 3))
        weakest[name] = score.argsort()[:4]
    stream = (
        dense.stem.weight.square().sum((1, 2, 3)) + dense.depthwise.weight.square().sum((1, 2, 3))
        + dense.head.weight.view(10, 8, 4).square().sum((0, 2))
        + sum(b.conv1.weight.square().sum((0, 2, 3)) + b.conv2.weight.square().sum((1, 2, 3))
              for b in (dense.first, dense.second))
    ).argsort()[:4]  # fmt: skip
    silenced(
        dense,
        {
            "first.conv2": lambda x: x.index_fill(1, weakest["first"], 0.0),
            "second.conv2": lambda x: x.index_fill(1, weakest["second"], 0.0),
            "first": lambda x: x.index_fill(1, stream, 0.0),
            "second": lambda x: x.index_fill(1, stream, 0.0),
            "depthwise": lambda x: x.index_fill(1, stream, 0.0),
            "head": lambda x: x.view(-1, 8, 4).index_fill(1, stream, 0.0).flatten(1),
        },
    )
    x, _ = images()
    assert_close(model(x), dense(x))


def test_the_layer_that_makes_the_output_stays_whole_and_the_ledger_says_so():
    model, modifier = (
        residuals(),
        StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[1, 8, 8]),
    )
    state = State(model=model)
    Lifecycle([modifier]).initialize(state)
    rows = {row.module: row for row in state.ledger}
    assert rows["head"].flags == ["left whole: it makes the output of the model"]
    assert rows["stem"].scheme == "8 -> 4 channels"
    before, after = (sum(p.numel() for p in m.parameters()) for m in (residuals(), model))
    assert rows["stem"].flags == [f"the model: {before} -> {after} parameters"]


def test_following_channels_changes_neither_modes_nor_statistics():
    model = residuals().train()
    model.second.eval()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modifier = StructuredPruningModifier(dimension="channels", ratio=0.5, start=5, input_shape=[1, 8, 8])
    state = torch.get_rng_state()
    initialized(model, modifier)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.first.training
    assert not model.second.training
    assert not model.stem.weight.requires_grad


def test_without_the_library_channels_are_refused_and_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[structured\]'"):
        initialized(perceptron(), StructuredPruningModifier(dimension="channels", start=0))
    initialized(llama(), StructuredPruningModifier(dimension="mlp", start=0))
