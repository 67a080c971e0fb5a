"""The order of rows and the rotary frequencies, beside the formulas, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_compress.export.gguf.architecture import architecture_of

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_pairs_of_rows_become_neighbours_in_llama_alone(decoder):
    """Rows i and i + D / 2 of each head, D = 16, become 2 i and 2 i + 1."""
    rows = torch.arange(64)
    moved = architecture_of(decoder("llama")).reordered("model.layers.0.self_attn.q_proj.weight", rows[:, None])
    expected = [16 * head + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
    assert moved[:, 0].tolist() == expected
    biases = architecture_of(decoder("llama")).reordered("model.layers.0.self_attn.k_proj.bias", rows[:32])
    assert biases.tolist() == expected[:32]
    assert architecture_of(decoder("llama")).reordered("model.layers.0.self_attn.v_proj.weight", rows) is rows
    assert architecture_of(decoder("qwen3")).reordered("model.layers.0.self_attn.q_proj.weight", rows) is rows


def test_factors_of_llama_3_are_those_of_transformers(decoder):
    model = decoder(rope_parameters=LLAMA3)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, device="cpu")
    plain = torch.tensor([10000.0 ** (-2 * i / 16) for i in range(8)])
    factors = architecture_of(model).rope_factors()
    assert_close(plain / factors, frequencies, rtol=1e-6, atol=0)
    assert factors[0] == 1
    assert math.isclose(factors[-1], 8)
    assert architecture_of(decoder()).rope_factors() is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type 'yarn' are not"),
        ("qwen2", {"rope_parameters": LLAMA3}, "type 'llama3' are not written to GGUF for Qwen2ForCausalLM, only def"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "has a sliding window, which is not written"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', and llama.cpp computes silu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(decoder, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        architecture_of(decoder(kind, **changes))


def test_other_models_are_refused_by_name():
    class GPT2LMHeadModel(nn.Module):
        config = SimpleNamespace()

    message = "GGUF is written for LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, and this is a GPT2LMHeadModel"
    with pytest.raises(ValueError, match=message):
        architecture_of(GPT2LMHeadModel())
