"""Turned weights are W R, rounded once; tied embeddings are untied where needed; a failing check restores the model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import RotationModifier, compress
from lightning_compress.modifiers.rotation.fuse import Turn, fuse, outputs_of, turns_of_heads
from lightning_compress.modifiers.rotation.hadamard import random_hadamard, random_orthogonal
from lightning_compress.modifiers.rotation.spaces import Head, Norm, Slot, Touch
from tests.support.rotation_models import build, logits, output_change

pytestmark = pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")


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
    assert output_change(model, before) < 1e-5
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_embeddings_stay_tied_where_the_last_norm_has_no_gain():
    model = build("llama", tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(1)
    before = logits(model)
    compress(model, RotationModifier(rotations=["R1"]))
    assert output_change(model, before) < 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_the_embeddings_are_those_times_the_matrix():
    """Against an independent computation of E R with the same signs."""
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


def test_a_failing_check_restores_the_model(monkeypatch):
    """As with a norm that is recognized wrongly: gains are not folded in."""
    model = build("llama", tie_word_embeddings=True)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Norm, "gain_of", lambda self, model: None)
    with pytest.raises(ValueError, match="outputs of the model changed by .* it was restored.*raise tolerance"):
        compress(model, RotationModifier())
    monkeypatch.undo()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert_close(logits(model), before, rtol=0, atol=0)


def test_a_zero_gain_with_a_bias_is_refused():
    model = build("gpt2")
    model.transformer.h[0].ln_1.weight.data[4] = 0
    with pytest.raises(ValueError, match="'transformer.h.0.ln_1' has gains of zero and a bias"):
        compress(model, RotationModifier())


def test_a_turn_acts_on_its_rows_alone_block_by_block():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8)).double(), torch.randn(5, 3, dtype=torch.float64)
    W, R = model[0].weight.detach().clone(), random_orthogonal(2, torch.Generator().manual_seed(0))
    turn = Turn(Touch(Slot("0", "weight"), 0, start=2, stop=6), R)
    with pytest.raises(ValueError, match="outputs of the model changed by"):
        fuse(model, [turn], [], lambda: model(x), None)
    assert torch.equal(model[0].weight, W)
    assert fuse(model, [turn], [], lambda: model(x), 10.0).changed == ["0.weight"]
    rows = torch.block_diag(torch.eye(2), R.t(), R.t(), torch.eye(2)).double() @ W
    assert_close(model[0].weight.detach(), rows, rtol=0, atol=1e-12)


def test_a_projection_of_two_attentions_is_refused():
    value, outputs = Touch(Slot("v", "weight"), 0), [Touch(Slot(name, "weight"), 1) for name in ("o", "p")]
    heads = [Head((value,), output, 4) for output in outputs]
    assert len(turns_of_heads([heads[0]] * 2, lambda head: torch.eye(4))) == 2
    with pytest.raises(ValueError, match="R2: 'p.weight' and another weight read the same values; leave R2 out"):
        turns_of_heads(heads, lambda head: torch.eye(4))


def test_outputs_are_the_logits_or_all_floating_tensors():
    x = torch.ones(2)
    assert [t.dtype for t in outputs_of({"a": x, "ids": torch.tensor([1])})] == [torch.float64]
    assert len(outputs_of((x, [x]))) == 2
    with pytest.raises(ValueError, match="the model returns no floating-point tensor, so that a rotation cannot be"):
        outputs_of({"ids": torch.tensor([1])})
