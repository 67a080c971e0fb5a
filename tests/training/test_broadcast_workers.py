"""What spawned workers cannot send back to the main process is named."""

import warnings

import pytest
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.training.broadcast import beside_weights, spawns_workers, ties, warn_of_workers
from tests.support.training_runs import Regression, quiet


def spawning(folder):
    return quiet(folder, strategy="ddp_fork", devices=2)


def tied_model():
    model = Regression().model
    model[2] = nn.Linear(8, 8)
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(("scheme", "group_size", "named"), [("W8A8", None, True), ("W4A16", 8, False)])
def test_the_quantization_of_activations_is_named_where_workers_are_spawned(tmp_path, scheme, group_size, named):
    model = Regression().model
    compress(model, QuantizationModifier(scheme=scheme, group_size=group_size, targets=["Linear"]))
    assert beside_weights(model) == (["the quantization of activations"] if named else [])
    for trainer, expected in ((spawning(tmp_path), named), (quiet(tmp_path), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_workers(trainer, model, ties(model))
        assert any("not the quantization of activations" in str(w.message) for w in caught) == expected
    assert spawns_workers(spawning(tmp_path))
    assert not spawns_workers(quiet(tmp_path))


def test_rotations_and_untied_weights_are_named(tmp_path):
    model = tied_model()
    before = ties(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    OnlineRotations((OnlineRotation("input", (1,) * 8),)).attach(model[0])
    with pytest.warns(UserWarning, match="not the rotations that run beside modules, nor that weights were untied"):
        warn_of_workers(spawning(tmp_path), model, before)
