"""Rotation changes no output and helps 4 bits; models that cannot be rotated are refused and left as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import GPTQModifier, QuantizationModifier, RotationModifier, compress
from tests.support.rotation_models import build, logits, output_change, plant_outliers, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")


BOTH = ["llama", "qwen2", "qwen3", "gemma", "phi", "phi3", "cohere", "mixtral", "qwen3_moe", "gpt2", "opt", "t5"]


STREAM_ONLY = ["gpt_neox"]  # keys and values interleaved in one weight


HEADS_ONLY = ["gemma2", "bert", "olmo2"]  # norms whose output goes into the stream


@pytest.mark.parametrize(("kind", "rotations"), [(k, ["R1", "R2"]) for k in BOTH] + [(k, ["R1"]) for k in STREAM_ONLY]
                         + [(k, ["R2"]) for k in HEADS_ONLY])  # fmt: skip
def test_no_output_changes(kind, rotations):
    model = build(kind)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    ledger = compress(model, RotationModifier(rotations=rotations))
    assert output_change(model, before) < 2e-5 if kind == "t5" else output_change(model, before) < 1e-5
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    rotated = {row.module for row in ledger}
    assert {name.rpartition(".")[0] for name in changed} >= rotated
    assert len(rotated) > (10 if rotations == ["R1", "R2"] and kind not in ("gpt2", "phi3") else 3)


def test_a_seed_gives_the_same_model():
    one, two = build("llama"), build("llama")
    for model in (one, two):
        compress(model, RotationModifier(seed=3))
    for name, tensor in one.state_dict().items():
        assert_close(two.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_plain_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(50, 24), nn.LayerNorm(24)
            self.inner, self.outer, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 10)

        def forward(self, ids):
            x = self.table(ids)
            x = x + self.outer(torch.relu(self.inner(self.norm(x))))
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model, ids = Net().eval(), torch.arange(20).reshape(2, 10)
    nn.init.normal_(model.norm.weight), nn.init.normal_(model.norm.bias)
    with torch.no_grad():
        before = model(ids)
        compress(model, RotationModifier(rotations=["R1"]))
        assert_close(model(ids), before, rtol=0, atol=1e-5 * before.abs().max().item())
    with pytest.raises(ValueError, match=r"R2: in Net no weight .* \(0 attentions ran\); leave R2 out"):
        compress(model, RotationModifier(rotations=["R2"]))


@pytest.mark.parametrize("modifier", [GPTQModifier, QuantizationModifier])
def test_with_outlier_channels_four_bits_lose_less_after_rotation(modifier):
    settings = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}

    def error(*rotate):
        model = plant_outliers(build("llama", **settings))
        before = logits(model)
        w4a4 = modifier(scheme="W4A4", group_size=-1, ignore=["re:.*lm_head"])
        compress(model, [*rotate, w4a4], token_batches(4))
        return ((logits(model) - before).square().sum() / before.square().sum()).item()

    plain, rotated = error(), error(RotationModifier())
    assert rotated < 0.6 * plain, (rotated, plain)


def test_unknown_rotations_are_refused():
    with pytest.raises(ValueError, match="R5"):
        RotationModifier(rotations=["R5"])
    with pytest.raises(ValueError, match="rotations"):
        RotationModifier(rotations=[])
