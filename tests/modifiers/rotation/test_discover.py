"""Spaces that can be turned are found; an error names what stands in the way."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, RotationModifier, compress
from tests.support.rotation_models import build


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


def test_a_model_that_returns_its_stream_is_refused():
    model = build("llama").model
    with pytest.raises(ValueError, match="LlamaModel cannot be rotated: the model returns a vector of it"):
        compress(model, RotationModifier(rotations=["R1"]))


def test_quantized_models_are_refused():
    model = build("llama")
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1, ignore=["re:.*lm_head"]))
    with pytest.raises(ValueError, match="q_proj' is quantized already; rotate before quantizing"):
        compress(model, RotationModifier())


def test_a_weight_that_is_never_used_is_named():
    model = build("llama")
    model.model.spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="1024 random tokens do not reach model.spare.weight"):
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
