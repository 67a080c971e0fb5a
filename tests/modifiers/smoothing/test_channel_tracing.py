"""Channels of a source and the inputs that they lead to: repeated heads, fused layers, leaks, dead units."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.modifiers.smoothing.fold import fold
from tests.support.smoothing_models import FF, C, Plain, batches, build, find_pairs, output


def test_experts_without_a_token_and_the_router_are_scaled_with_the_others():
    data = batches("mixture")
    model, modules, pairs = find_pairs("mixture", [data[0][:1, :2], *data])  # two tokens: two experts at most
    first = next(pair for pair in pairs if pair.source == "0.norm")
    experts = {f"0.mixture.experts.{i}.{part}" for i in range(4) for part in ("gate", "up")}
    assert set(first.consumers) == experts | {"0.mixture.router"}
    dense = copy.deepcopy(model)
    for pair in pairs:
        fold(pair, modules, 0.5 + torch.rand(len(pair.channels_J)))
    for batch in data:
        assert torch.allclose(output(model, batch), output(dense, batch), atol=1e-5)


def test_heads_of_gqa_share_a_scale():
    _, modules, pairs = find_pairs("llama", batches("llama"))
    pair = next(pair for pair in pairs if pair.source.endswith("0.self_attn.v_proj"))
    (consumer,) = pair.consumers.values()
    assert modules[pair.source].out_features == len(pair.channels_J) == C // 2
    heads = consumer.index_C.view(2, 2, 8)  # [kv head, repeats, head size]
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0].flatten(), torch.arange(C // 2))


@pytest.mark.parametrize(("name", "source", "channels"), [
    ("gpt2", "transformer.h.0.attn.c_attn", range(2 * C, 3 * C)),
    ("phi3", "model.layers.0.self_attn.qkv_proj", range(C + C // 2, 2 * C)),
    ("phi3", "model.layers.0.mlp.gate_up_proj", range(FF, 2 * FF)),
    ("neox", "gpt_neox.layers.1.attention.query_key_value", [24 * h + 16 + i for h in range(4) for i in range(8)]),
])  # fmt: skip
def test_only_the_values_of_a_fused_layer_are_scaled(name, source, channels):
    _, _, pairs = find_pairs(name, batches(name))
    assert next(pair for pair in pairs if pair.source == source).channels_J.tolist() == list(channels)


class Leaky(nn.Module):
    """The norm feeds the linear layer, and something else."""

    def __init__(self, how: str):
        super().__init__()
        self.norm, self.fc, self.how = nn.LayerNorm(C), nn.Linear(C, C), how
        self.other = nn.Parameter(torch.randn(C))
        self.register_buffer("table", torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        extra = {"residual": h, "buffer": h @ self.table, "parameter": h * self.other, "gate": torch.sigmoid(h)}
        return self.fc(h) + extra[self.how]


@pytest.mark.parametrize("how", ["residual", "buffer", "parameter", "gate"])
def test_a_norm_that_feeds_something_else_is_not_a_source(how):
    torch.manual_seed(0)
    _, _, pairs = find_pairs(Leaky(how).eval(), batches("flat"))
    assert pairs == []


def test_a_leak_far_below_the_residual_is_seen():
    """1e6 times the branch: the block's output alone would hide it."""

    class Hidden(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * x + super().forward(x) + 1e-3 * self.act(self.norm(x))

    _, _, pairs = find_pairs(nn.Sequential(Hidden(nn.GELU()), Hidden(nn.GELU())).eval(), batches("flat"))
    assert pairs == []


def test_a_layer_that_runs_twice_and_tied_weights_are_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(x)) + self.b(self.norm(x + 1))

    assert find_pairs(Twice().eval(), batches("flat"))[2] == []
    tied = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)).eval()
    tied[3].weight = tied[1].weight
    assert find_pairs(tied, batches("flat"))[2] == []


def test_units_that_are_always_zero_follow_the_pattern_of_the_others():
    model = build("flat")
    model[1].bias.data[5] = -1e3  # never fires
    dense = copy.deepcopy(model)
    _, modules, pairs = find_pairs(model, batches("flat"))
    pair = next(pair for pair in pairs if pair.source == "1")
    assert len(pair.channels_J) == FF
    fold(pair, modules, torch.full((FF,), 3.0))
    dense[1].bias.data[5] = model[1].bias.data[5] = 0.0  # on other data it may
    x = torch.randn(4, C)
    assert torch.allclose(model(x), dense(x), atol=1e-5)
