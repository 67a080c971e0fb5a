"""Checkpoints of a model that shrank: the cuts are repeated in a freshly built one, before its weights are loaded."""

import pytest
import torch
from torch import nn

from lightning_compress.training.pruned_checkpoints import carry_shapes, read_shapes, same_shapes, write_shapes
from tests.support.training_runs import Regression


def small_steps(model: nn.Module):
    from lightning_compress import StructuredPruningModifier, compress

    pytest.importorskip("torch_pruning")
    compress(model, StructuredPruningModifier(dimension="channels", ratio=0.5, ignore=["2"], input_shape=[8], start=0))
    checkpoint = {}
    write_shapes(checkpoint, model)
    return checkpoint


def test_a_fresh_model_gets_the_shapes_of_the_checkpoint():
    small = Regression()
    checkpoint = small_steps(small.model)
    checkpoint["state_dict"] = small.state_dict()
    fresh = Regression()
    assert not same_shapes(checkpoint["state_dict"], fresh)
    read_shapes(checkpoint, fresh.model)
    assert same_shapes(checkpoint["state_dict"], fresh)
    fresh.load_state_dict(checkpoint["state_dict"])
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), small(x))
    with pytest.raises(ValueError, match="saved when 0 of the 1 cuts into the model had been made"):
        read_shapes({}, fresh.model)


def test_the_hooks_of_the_object_write_and_read_shapes_inside_the_context():
    small, fresh = Regression(), Regression()
    small_steps(small.model)
    checkpoint, plain = {}, {}
    with carry_shapes(small, None), carry_shapes(fresh, None):
        small.on_save_checkpoint(checkpoint)
        fresh.on_load_checkpoint(checkpoint)
    assert fresh.model[0].out_features == small.model[0].out_features == 4
    small.on_save_checkpoint(plain)
    assert plain == {}
