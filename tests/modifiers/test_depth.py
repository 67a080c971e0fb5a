"""Depth pruning: whole blocks go, those that do least, and the rest is the model that never had them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import compress
from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.depth import DepthPruningModifier
from lightning_compress.team import Team
from tests.support.structure_runs import Tower, llama, residuals, tokens
from tests.support.training_loop import train


def initialized(model, modifier):
    state = State(model=model)
    Lifecycle([modifier]).initialize(state)
    return state


def test_named_layers_go_at_set_up_and_a_config_with_fewer_layers_rebuilds_the_model():
    model = llama(num_hidden_layers=4)
    kept = [model.model.layers[0], model.model.layers[2]]
    initialized(model, DepthPruningModifier(layers=[1, -1], start=0))
    assert list(model.model.layers) == kept
    assert model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert_close(rebuilt(**tokens()).logits, model(**tokens()).logits)
    with torch.no_grad():
        cached = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False)
        plain = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_lists_with_an_entry_for_each_layer_lose_the_same_entries():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    types = list(model.config.layer_types)
    assert len(set(types)) == 2
    initialized(model, DepthPruningModifier(layers=[0], start=0))
    assert model.config.layer_types == types[1:]
    rebuilt = Qwen3ForCausalLM(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert_close(rebuilt(**tokens()).logits, model(**tokens()).logits)


def test_the_least_influential_blocks_go_after_training_batches():
    model, sizes = Tower(), []
    blocks = list(model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    modifier = DepthPruningModifier(count=2, start=2)
    train(model, [modifier], 4, optimizer=optimizer, after_step=lambda step: sizes.append(len(model.blocks)))
    assert sizes == [5, 5, 3, 3]
    assert list(model.blocks) == [blocks[0], blocks[2], blocks[4]]
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters()) == set(optimizer.state)
    assert not modifier.hooked


def test_a_llama_loses_the_block_that_does_nothing_after_calibration():
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        expected = model(**tokens()).logits
    compress(model, DepthPruningModifier(count=1), [tokens(seed=s) for s in range(2)])
    assert model.config.num_hidden_layers == 3
    assert_close(model(**tokens()).logits, expected)


REFUSED = [
    ({}, "give either layers .* or count .*, got neither"),
    ({"layers": [1], "count": 1}, "got both"),
    ({"layers": []}, "name blocks; protect"),
    ({"layers": [1], "protect": 1}, "protect is for count"),
    ({"count": 0}, "count=0"),
    ({"count": 1, "start": 0}, "start=0 cuts at set-up: give a later start"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DepthPruningModifier(**arguments)


UNFIT = [
    (Tower, {"layers": [7]}, "'blocks' has 5 blocks, and not a block 7"),
    (Tower, {"layers": [4, -1]}, "names a block twice"),
    (Tower, {"layers": [0, 1, 2, 3, 4]}, "5 of 5 blocks in 'blocks' cannot be removed"),
    (Tower, {"count": 2, "protect": 2, "start": 3}, "2 of 5 blocks .* with protect=2"),
    (Tower, {"layers": [0], "blocks": "head"}, r"blocks='head' is not a ModuleList .* the model has \['blocks'\]"),
    (residuals, {"layers": [0]}, "cannot tell which list of blocks is meant, found none"),
]


@pytest.mark.parametrize(("build", "arguments", "message"), UNFIT, ids=lambda v: getattr(v, "__name__", str(v)[:40]))
def test_models_that_do_not_fit_are_refused_at_set_up(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        initialized(build(), DepthPruningModifier(**{"start": 0, **arguments}))


def test_a_block_that_changes_the_shape_cannot_be_left_out():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 32)), nn.Sequential(nn.Linear(32, 8)))
    with pytest.raises(ValueError, match=r"takes \(32, 16\) and gives \(32, 32\): without it shapes would not fit"):
        compress(Wrapped(model), DepthPruningModifier(count=1), [torch.randn(32, 16)])


class Wrapped(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return self.tower(x)


def test_several_processes_prune_at_set_up_only(monkeypatch):
    monkeypatch.setattr("lightning_compress.modifiers.depth.Team.present", lambda: Team(0, 2))
    with pytest.raises(ValueError, match="cannot change once DDP has wrapped it: name the layers, with start=0"):
        initialized(Tower(), DepthPruningModifier(count=1, start=3))
    initialized(Tower(), DepthPruningModifier(layers=[1], start=0))
