"""Spaces that can be turned are found in a run on token ids; an error names what stands in the way."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, RotationModifier, compress
from lightning_compress.modifiers.rotation.discover import token_run
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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.drop, self.calls = nn.Embedding(50, 4), nn.Dropout(0.5), []

    def forward(self, ids):
        self.calls.append((ids, self.training, torch.is_grad_enabled()))
        return self.drop(self.table(ids))


def test_a_run_repeats_its_tokens_in_eval_mode_and_restores_the_modes():
    model = Net().train()
    model.drop.eval()
    run = token_run(model, rows=3)
    assert torch.equal(run(), run())
    (ids, *first), (again, *second) = model.calls
    assert torch.equal(ids, again)
    assert (ids.shape, int(ids.max()) < 50) == ((3, 16), True)
    assert first == second == [False, False]
    assert (model.training, model.drop.training) == (True, False)
    token_run(model, rows=3, seed=1)()
    assert not torch.equal(model.calls[-1][0], ids)


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Linear(4, 4)), "Sequential has no nn.Embedding"),
    (nn.ModuleDict({"table": nn.Embedding(4, 4)}), "ModuleDict does not run on .2, 16. of them"),
])  # fmt: skip
def test_models_of_other_inputs_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        compress(model, RotationModifier())
