"""Structured pruning: shapes shrink, what stays computes what it did, and the optimizer keeps its memory."""

import pytest
from torch import nn

from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from lightning_compress.team import Team
from tests.support.structure_runs import initialized, llama, perceptron
from tests.support.training_loop import train


def test_pruning_follows_the_schedule_down_to_its_end():
    model, sizes = perceptron(), []
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.75, start=0, end=8, update=2, round_to=4
    )
    train(model, [modifier], 12, after_step=lambda step: sizes.append(model[0].out_features))
    # 32 neurons, share 0.75 p at steps 2, 4, 6, rounded up to a multiple of 4; the first forward knows the channels
    assert sizes == [32, 32, 28, 28, 20, 20, 16, 16, 8, 8, 8, 8]


def test_at_start_zero_without_an_input_shape_channels_go_after_the_first_batch():
    model, sizes = perceptron(), []
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=0)
    train(model, [modifier], 3, after_step=lambda step: sizes.append(model[0].out_features))
    assert sizes == [32, 16, 16]


UNFIT = [
    (llama, {"ratio": 1 - 1e-12}, "leaves none of the 48 neurons of 'model.layers.0.mlp'"),
    (llama, {"ratio": 0.01}, "removes none of the 48 neurons"),
    (llama, {"ratio": 0.25, "round_to": 64}, "with round_to=64 removes none of the 48 neurons"),
    (llama, {"dimension": "heads", "ratio": 0.3}, "cuts through the 4 key/value heads .* give one of 0.25, 0.5, 0.75"),
    (llama, {"targets": ["re:.*layers.0.mlp"]}, "cannot state the sizes after pruning.*prune all blocks alike"),
    (llama, {"targets": ["re:.*self_attn"]}, "matches no mlp group: .* such as 'model.layers.0.mlp' or 'LlamaMLP'"),
    (llama, {"targets": ["LlamaMPL"]}, "did you mean 'LlamaMLP'"),
    (llama, {"dimension": "channels"}, "does not follow a LlamaForCausalLM"),
    (perceptron, {}, "found no MLP"),
    (perceptron, {"dimension": "heads"}, "found no attention with q_proj"),
    (perceptron, {"dimension": "channels", "targets": ["ReLU"]}, r"targets without output channels: 1 \(ReLU\)"),
    (perceptron, {"dimension": "channels", "targets": ["4"], "input_shape": [16]}, "'4' makes the output of the model"),
    (perceptron, {"dimension": "channels", "targets": ["re:4"], "input_shape": [16]}, "every target makes the output"),
    (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 4, 1)),
        {"dimension": "channels", "input_shape": [4, 5], "targets": ["0"]},
        "cannot prune through '1': a convolution with groups=2",
    ),
    (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 1)),
        {"dimension": "channels", "input_shape": [4, 5]},
        "cannot prune through '1', a GroupNorm",
    ),
]


@pytest.mark.parametrize(("build", "arguments", "message"), UNFIT, ids=lambda v: getattr(v, "__name__", str(v)[:40]))
def test_models_that_do_not_fit_are_refused_at_set_up(build, arguments, message):
    model = build()
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        initialized(model, StructuredPruningModifier(**{"start": 0, "ratio": 0.5, **arguments}))
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_several_processes_prune_at_set_up_only(monkeypatch):
    monkeypatch.setattr("lightning_compress.modifiers.structured.modifier.Team.present", lambda: Team(0, 2))
    with pytest.raises(ValueError, match="cannot change once DDP has wrapped it: prune at set-up with start=0"):
        initialized(llama(), StructuredPruningModifier(start=10))
    initialized(llama(), StructuredPruningModifier(start=0))
