"""Maps and masks are read from whatever models take and give."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.distillation.model_outputs import (
    attention_maps,
    features_last,
    inputs_of,
    is_causal,
    token_mask,
)

USUAL = {"ignore_index": -100, "shift": False, "key": None}


def test_inputs_have_the_names_of_the_signature():
    class Model(nn.Module):
        def forward(self, ids, mask=None, **more):
            return ids

    assert inputs_of(Model(), (1, 2), {"other": 3}) == {"ids": 1, "mask": 2, "other": 3}
    assert inputs_of(Model(), (1,), {"mask": 2}) == inputs_of(Model(), (), {"ids": 1, "mask": 2})
    assert list(inspect.signature(Model.forward).parameters)[-1] == "more"


def test_a_student_with_fewer_layers_learns_from_every_nth_of_the_teachers():
    maps = [torch.full((1, 1, 1, 1), float(i)) for i in range(6)]
    pairs = attention_maps(SimpleNamespace(attentions=tuple(maps[:2])), SimpleNamespace(attentions=tuple(maps)))
    assert [(a.item(), b.item()) for a, b in pairs] == [(0, 2), (1, 5)]
    with pytest.raises(ValueError, match="the teacher has 6 layers and the model 4; expected a multiple"):
        attention_maps(SimpleNamespace(attentions=tuple(maps[:4])), SimpleNamespace(attentions=tuple(maps)))
    with pytest.raises(ValueError, match="the teacher gives no attention maps; use attn_implementation='eager'"):
        attention_maps(SimpleNamespace(attentions=tuple(maps)), SimpleNamespace(attentions=None))
    with pytest.raises(ValueError, match="the model gives no attention maps"):
        attention_maps(torch.ones(2), SimpleNamespace(attentions=tuple(maps)))


def test_features_are_channels_in_maps_and_last_elsewhere():
    assert features_last(torch.zeros(2, 3, 4, 5), None).shape == (2, 4, 5, 3)
    assert features_last(torch.zeros(2, 4, 5, 3), -1).shape == (2, 4, 5, 3)
    assert features_last(torch.zeros(2, 3, 4), None).shape == (2, 3, 4)
    assert features_last(torch.zeros(2, 3, 4), 1).shape == (2, 4, 3)


def test_which_tokens_count():
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 4, 5, -100], [-100, -100, 6, 7]])
    shape = (2, 4)
    assert token_mask({}, None, shape, **USUAL) is None
    assert torch.equal(token_mask({"attention_mask": attention}, None, shape, **USUAL), attention.bool())
    both = token_mask({"attention_mask": attention}, {"labels": labels}, shape, **USUAL)
    assert both.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    shifted = token_mask({"labels": labels}, None, shape, ignore_index=-100, shift=True, key=None)
    assert shifted.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    other = token_mask({"labels": labels}, None, shape, ignore_index=5, shift=False, key=None)
    assert other.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    own = token_mask({}, {"answer": labels > 4}, shape, ignore_index=-100, shift=False, key="answer")
    assert own.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert token_mask({"attention_mask": attention}, None, (2,), **USUAL) is None  # a class per text
    assert token_mask({"labels": None}, (1, 2), shape, **USUAL) is None


def test_a_missing_mask_is_named():
    with pytest.raises(ValueError, match=r"mask_key='answer' is not among \['ids'\]; expected a mask of"):
        token_mask({"ids": torch.ones(2)}, None, (2, 4), ignore_index=-100, shift=False, key="answer")
    with pytest.raises(ValueError, match=r"mask_key='answer' has shape \(2,\)"):
        token_mask({}, {"answer": torch.ones(2)}, (2, 4), ignore_index=-100, shift=False, key="answer")


def test_causal_models_are_known_by_their_class():
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert is_causal(transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny)))
    assert not is_causal(transformers.BertForMaskedLM(transformers.BertConfig(**tiny)))
    assert not is_causal(nn.Linear(2, 2))
