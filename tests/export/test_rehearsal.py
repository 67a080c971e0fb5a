"""What cannot be saved is found before training, and leaves nothing."""

import pytest
import torch
from torch import nn

from lightning_compress.export.rehearsal import rehearse
from lightning_compress.export.save import save

transformers = pytest.importorskip("transformers")


def llama(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, **changes))
    return model


class Unsavable:
    def save_pretrained(self, folder):
        raise TypeError("not JSON serializable")


def test_a_model_that_can_be_saved_stays_as_it_is():
    model = llama(tie_word_embeddings=True)
    before = dict(vars(model.config))
    rehearse(model, [])
    assert vars(model.config) == before
    rehearse(nn.Linear(1, 1), [])


def test_an_invalid_generation_config_is_named():
    model = llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.9, False
    with pytest.raises(ValueError, match=r"of this LlamaForCausalLM cannot be saved(?s:.)*unset `temperature`"):
        rehearse(model, [])


def test_tied_weights_in_a_list_are_named():
    model = llama()
    model._tied_weights_keys = ["lm_head.weight"]
    with pytest.raises(ValueError, match=r"_tied_weights_keys is a list, .* only models with a dict there"):
        rehearse(model, [])


def test_adapters_are_named():
    class LoraLinear(nn.Linear):
        pass

    LoraLinear.__module__ = "peft.tuners.lora.layer"
    model = nn.Sequential(nn.Linear(1, 1), type("Scaled", (LoraLinear,), {})(1, 1))
    with pytest.raises(ValueError, match=r"carries PEFT adapters \('1', ...\); merge them into its weights"):
        rehearse(model, [])
    rehearse(model[:1], [])


def test_what_is_not_a_tokenizer_or_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"this Unsavable cannot be saved.*TypeError: not JSON serializable"):
        rehearse(nn.Linear(1, 1), [Unsavable()])
    for wrong in ("gpt2", ["gpt2"], torch.ones(1)):
        with pytest.raises(ValueError, match=r"expected a tokenizer or processor with save_pretrained"):
            save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "out", tokenizer=wrong)
    assert list(tmp_path.iterdir()) == []
