"""Rotation changes no output; what cannot be rotated is refused by name, and nothing has changed then."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import GPTQModifier, QuantizationModifier, RotationModifier, compress
from lightning_compress.modifiers.rotation.spaces import Norm
from tests.support.rotation_models import build, logits, plant_outliers, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")

BOTH = ["llama", "qwen2", "qwen3", "gemma", "phi", "phi3", "cohere", "mixtral", "qwen3_moe", "gpt2", "opt", "t5"]
STREAM_ONLY = ["gpt_neox"]  # keys and values interleaved in one weight
HEADS_ONLY = ["gemma2", "bert", "olmo2"]  # norms whose output goes into the stream


def moved(model: nn.Module, before: torch.Tensor) -> float:
    return ((logits(model) - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize(("kind", "rotations"), [(k, ["R1", "R2"]) for k in BOTH] + [(k, ["R1"]) for k in STREAM_ONLY]
                         + [(k, ["R2"]) for k in HEADS_ONLY])  # fmt: skip
def test_no_output_changes(kind, rotations):
    model = build(kind)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    ledger = compress(model, RotationModifier(rotations=rotations))
    assert moved(model, before) < 2e-5 if kind == "t5" else moved(model, before) < 1e-5
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    rotated = {row.module for row in ledger}
    assert {name.rpartition(".")[0] for name in changed} >= rotated
    assert len(rotated) > (10 if rotations == ["R1", "R2"] and kind not in ("gpt2", "phi3") else 3)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("gemma", True)])
def test_tied_embeddings_are_untied_and_the_config_says_so(kind, tied):
    model = build(kind, tie_word_embeddings=tied)
    before = logits(model)
    modifier = RotationModifier(rotations=["R1"])
    if tied:
        with pytest.warns(UserWarning, match="lm_head.weight shared its weight with the embeddings"):
            compress(model, modifier)
    else:
        compress(model, modifier)
    assert moved(model, before) < 1e-5
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_embeddings_stay_tied_where_the_last_norm_has_no_gain():
    model = build("llama", tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(1)
    before = logits(model)
    compress(model, RotationModifier(rotations=["R1"]))
    assert moved(model, before) < 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [
    {"transform_type": "hadamard"}, {"transform_type": "random-matrix"}, {"transform_block_size": 8},
    {"transform_type": "random-matrix", "transform_block_size": 4}, {"seed": 5},
], ids=str)  # fmt: skip
def test_every_kind_of_matrix(kind, settings):
    model = build(kind)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    compress(model, RotationModifier(**settings))
    assert moved(model, before) < 1e-5
    standard = build(kind)
    compress(standard, RotationModifier())
    name = "model.embed_tokens.weight" if kind == "llama" else "transformer.wte.weight"
    assert not torch.equal(model.state_dict()[name], weights[name])
    same = kind == "gpt2" and settings == {"transform_type": "hadamard"}  # there it needs signs
    assert torch.equal(model.state_dict()[name], standard.state_dict()[name]) == same


def test_a_seed_gives_the_same_model():
    one, two = build("llama"), build("llama")
    for model in (one, two):
        compress(model, RotationModifier(seed=3))
    for name, tensor in one.state_dict().items():
        assert_close(two.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_embeddings_are_those_times_the_matrix():
    """Against an independent computation: E R with R made of the same signs."""
    from lightning_compress.modifiers.rotation.hadamard import random_hadamard

    model = build("llama", tie_word_embeddings=False)
    E, W_o, W, g = (p.detach().double().clone() for p in (
        model.model.embed_tokens.weight, model.model.layers[1].self_attn.o_proj.weight,
        model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].post_attention_layernorm.weight))  # fmt: skip
    compress(model, RotationModifier(rotations=["R1"], seed=11))
    R = random_hadamard(32, torch.Generator().manual_seed(11))
    layer = model.model.layers[1]
    assert_close(model.model.embed_tokens.weight.double(), E @ R, rtol=1e-6, atol=1e-6)
    assert_close(layer.self_attn.o_proj.weight.double(), R.t() @ W_o, rtol=1e-6, atol=1e-6)
    assert_close(layer.mlp.up_proj.weight.double(), W * g @ R, rtol=1e-6, atol=1e-6)
    assert bool((layer.post_attention_layernorm.weight == 1).all())


def test_bfloat16_is_rotated_with_one_rounding():
    model = build("llama").bfloat16()
    exact = copy.deepcopy(model).double()
    compress(model, RotationModifier())
    compress(exact, RotationModifier())
    for name, tensor in model.state_dict().items():
        assert_close(tensor, exact.state_dict()[name].bfloat16(), rtol=0, atol=0)


def test_a_module_that_is_no_model_of_transformers():
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


# -- what it is for ---------------------------------------------------------------------------------------------------


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


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rotations", "message"), [
    ("gemma2", ["R1"], "Gemma2ForCausalLM cannot be rotated: the output of 'model.layers.0.post_attention_layernorm' "
     "is added to it.*leave R1 out"),
    ("bert", ["R1", "R2"], "the output of 'bert.embeddings.LayerNorm' is added to it"),
    ("gpt_neox", ["R2"], "R2: in GPTNeoXForCausalLM no weight was seen to multiply the values.*leave R2 out"),
])  # fmt: skip
def test_models_that_cannot_be_rotated_are_left_as_they_were(kind, rotations, message):
    model = build(kind)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress(model, RotationModifier(rotations=rotations))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_model_that_gives_out_its_stream_is_refused():
    model = build("llama").model
    with pytest.raises(ValueError, match="LlamaModel cannot be rotated: the model gives out a vector of it"):
        compress(model, RotationModifier(rotations=["R1"]))


def test_a_size_without_a_hadamard_matrix():
    settings = {"hidden_size": 60 * 2 - 28, "num_attention_heads": 2, "num_key_value_heads": 2}
    message = (
        r"R1 rotates 92 features: no Hadamard matrix of order 92 .* nearest orders are 88 and 96, and blocks of 4 "
        r"divide it; set transform_block_size, or transform_type='random-matrix'"
    )
    with pytest.raises(ValueError, match=message):
        compress(build("llama", **settings), RotationModifier())
    model = build("llama", **settings)
    before = logits(model)
    compress(model, RotationModifier(rotations=["R1"], transform_type="random-matrix"))
    assert moved(model, before) < 1e-5


def test_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="transform_block_size=24 does not divide the 32 features of R1"):
        compress(build("llama"), RotationModifier(transform_block_size=24))


def test_a_failing_check_puts_everything_back(monkeypatch):
    """As if the norm had been recognized wrongly: gains are not folded in."""
    model = build("llama", tie_word_embeddings=True)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Norm, "gain_of", lambda self, model: None)
    with pytest.raises(ValueError, match="outputs of the model changed by .* put back as it was.*raise tolerance"):
        compress(model, RotationModifier())
    monkeypatch.undo()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert_close(logits(model), before, rtol=0, atol=0)


def test_quantized_models_are_refused():
    model = build("llama")
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1, ignore=["re:.*lm_head"]))
    with pytest.raises(ValueError, match="q_proj' is quantized already; rotate before quantizing"):
        compress(model, RotationModifier())


def test_a_zero_gain_beside_a_bias_is_refused():
    model = build("gpt2")
    model.transformer.h[0].ln_1.weight.data[4] = 0
    with pytest.raises(ValueError, match="'transformer.h.0.ln_1' has gains of zero and a bias"):
        compress(model, RotationModifier())


def test_a_weight_that_is_never_used_is_named():
    model = build("llama")
    model.model.spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="1024 random tokens do not reach model.spare.weight"):
        compress(model, RotationModifier())


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Linear(4, 4)), "Sequential has no nn.Embedding"),
    (nn.ModuleDict({"table": nn.Embedding(4, 4)}), "ModuleDict does not run on .2, 16. of them"),
])  # fmt: skip
def test_models_of_other_inputs_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        compress(model, RotationModifier())


def test_an_input_that_is_computed_from_the_stream_without_a_parameter_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

        def forward(self, ids):
            return self.head(torch.tanh(self.table(ids)))

    with pytest.raises(ValueError, match="the residual stream of Net cannot be rotated: tanh needs it as it is"):
        compress(Net(), RotationModifier(rotations=["R1"]))


def test_unknown_rotations_are_refused():
    with pytest.raises(ValueError, match="R5"):
        RotationModifier(rotations=["R5"])
    with pytest.raises(ValueError, match="rotations"):
        RotationModifier(rotations=[])
