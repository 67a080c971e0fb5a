"""What plain transformers would load otherwise than it was saved is named."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.quant.record import Quantized


def test_sizes_that_the_config_does_not_promise_are_named(tmp_path, tiny_llama):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :96])
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:96])
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:96])
    with pytest.warns(UserWarning, match=r"3 weights do not have the sizes.*gate_proj.weight \(96, 128\), by th"):
        save(model, tmp_path / "out")


def test_weights_that_the_class_never_loads_are_named(tmp_path, tiny_llama):
    """Layers that predict more tokens (MTP) lie beside many models; from_pretrained passes over them."""
    from transformers import AutoModelForCausalLM

    from lightning_compress import QuantizationModifier, compress

    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.layers.0.weight": torch.ones(2), "mtp.layers.0.inv_freq": torch.ones(2)}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source)
    model._keys_to_ignore_on_load_unexpected = ["mtp.*"]
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1, ignore=["lm_head"]))
    with pytest.warns(UserWarning, match=r"holds 1 tensors that LlamaForCausalLM does not load, such as mtp.layers.0"):
        save(model, tmp_path / "out")


def test_what_was_added_to_a_model_comes_back_in_one_that_has_it_too(tmp_path, tiny_llama, quantize, scheme_of):
    def build(value):
        model = tiny_llama()
        model.register_buffer("steps", torch.full((3,), value))
        model.reward = nn.Linear(128, 64)
        return model

    model = quantize(build(2.0), scheme_of("W4A16"), ["re:.*lm_head"])
    with pytest.warns(UserWarning, match=r"and skip what .*: reward.bias, reward.weight, steps \(3 tensors\)"):
        save(model, tmp_path / "out")
    again = load(tmp_path / "out", build(0.0), packed=False)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert Quantized.find(again).keys() == Quantized.find(model).keys() >= {"reward"}
    with pytest.raises(ValueError, match=r"'reward.weight_packed', .*where modules were added to the model"):
        load(tmp_path / "out")


def test_weights_that_the_class_would_initialize_anew_are_named(tmp_path, tiny_llama):
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 2
    with pytest.warns(UserWarning, match=r"and initialize anew what this LlamaForCausalLM lacks: model.*1\."):
        save(model, tmp_path / "out")
    model.config.num_hidden_layers = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path / "right")


def test_a_model_from_no_folder_is_not_held_against_the_current_one(tmp_path, tiny_llama, monkeypatch, recwarn):
    from lightning_compress.export.plain_transformers import warn_of_dropped

    save_file({"mtp.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model._keys_to_ignore_on_load_unexpected = ["mtp.*"]
    assert model.config._name_or_path == ""
    warn_of_dropped(model)
    assert not recwarn.list
