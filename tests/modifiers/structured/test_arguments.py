"""Arguments of structured pruning that are refused, and what the message says."""

import pytest
import torch
from torch import nn

from lightning_compress import compress
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.architecture_models import ARCHITECTURES

REFUSED = [
    ({"ratio": 1.0}, "ratio=1.0: Input should be less than 1"),
    ({"ratio": -0.1}, "ratio=-0.1: Input should be greater than or equal to 0"),
    ({"round_to": 0}, "round_to=0: Input should be greater than or equal to 1"),
    ({"input_shape": [4]}, "input_shape is for dimension='channels'"),
    ({"importance": "taylor"}, "needs gradients: give start"),
    ({"importance": "taylor", "start": 0}, "needs batches before the cut, and start=0 cuts at set-up"),
    ({"importance": "activation", "start": 0, "end": 9, "schedule": "constant"}, "needs batches before the cut"),
    ({"start": 2, "end": 4, "update": 3}, "update=3.0 is larger than the window from 2.0 to 4.0"),
    ({"dimension": "layers"}, "dimension='layers'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruningModifier(**arguments)


@pytest.mark.filterwarnings("ignore")
def test_auto_takes_mlps_where_there_are_some_and_channels_elsewhere():
    block = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = block

        def forward(self, x):
            return self.mlp["fc2"](self.mlp["fc1"](x).relu())

    model, batch = nn.Sequential(Block(), nn.Linear(8, 4)), torch.randn(4, 8)
    compress(model, StructuredPruningModifier(dimension="auto", ratio=0.5), [batch])
    assert [model[0].mlp["fc1"].out_features, model[1].in_features] == [8, 8]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    compress(model, StructuredPruningModifier(dimension="auto", ratio=0.5), [batch])
    assert [model[0].out_features, model[2].out_features] == [8, 4]


@pytest.mark.parametrize("window", [{}, {"start": 0}], ids=["after training", "at set-up"])
def test_experts_in_one_tensor_are_refused_by_name(window):
    architecture = ARCHITECTURES["mixtral"]
    message = "the MLPs of 'model.layers.0.mlp.experts'.* are experts of a mixture in one tensor.*use REAPModifier"
    with pytest.raises(ValueError, match=message):
        compress(architecture.build(), StructuredPruningModifier(**window), architecture.batches())


def test_dense_mlps_beside_experts_are_pruned():
    architecture = ARCHITECTURES["deepseek_v3"]
    model = architecture.build()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    compress(model, StructuredPruningModifier(ratio=0.5, targets=["re:.*layers.0.mlp"]), architecture.batches())
    changed = [n for n, p in model.named_parameters() if tuple(p.shape) != before[n]]
    assert sorted(changed) == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
