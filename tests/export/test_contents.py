"""What is written packed, what stays dense and is named, and what is not written at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from tests.support.export_models import assert_same_records, conv_net


def test_modules_that_no_loader_reads_packed_stay_dense_and_are_named(tmp_path, quantize, scheme_of):
    model = conv_net()
    quantize(model, scheme_of("", ["Conv2d"], num_bits=4, strategy="channel", symmetric=False))
    quantize(model, scheme_of("W8A8"))
    with pytest.warns(UserWarning, match=r"2 of 3 .* does not shrink: 0 \(no loader reads a packed Conv2d\); 2 \("):
        save(model, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["0.weight"].dtype == torch.float32
    assert weights["5.weight"].dtype == torch.int8
    own = json.loads((tmp_path / "out" / "lightning_compress.json").read_text())
    assert sorted(own["dense"]) == ["0", "2"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    x = torch.randn(2, 3, 8, 8)
    again = load(tmp_path / "out", conv_net(), packed=False)
    assert_close(again(x), model(x), rtol=0, atol=0)
    assert_same_records(model, again)


def test_quantized_inputs_that_plain_loaders_will_skip_are_named(tmp_path, quantize, scheme_of):
    model = quantize(conv_net(), scheme_of("W8A8", ["Conv2d"]))
    with pytest.warns(UserWarning, match="will not quantize the inputs of 0, 2"):
        save(model, tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert_close(load(tmp_path / "out", conv_net(), packed=False)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(tmp_path, small_net, quantize, scheme_of, value):
    quantize(small_net, scheme_of("W8A8"))
    small_net[3].weight.data[1] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 parameters or buffers, such as 3.weight"):
        save(small_net, tmp_path / "out")
    model = quantize(conv_net(), scheme_of("W8A8"))
    model[3].running_mean[3] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 parameters or buffers, such as 3.running_mean"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_adapters_and_weights_that_are_elsewhere(tmp_path, tiny_llama, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))[3].to("meta")
    with pytest.raises(ValueError, match=r"2 weights are not in memory, such as 3.weight; load the model without"):
        save(small_net, tmp_path / "out")
    llama = quantize(tiny_llama(), scheme_of("W4A16"))
    llama._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="carries PEFT adapters; merge them"):
        save(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == []
