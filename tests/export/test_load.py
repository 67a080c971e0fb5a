"""What save wrote comes back; a folder or a model that does not fit is named."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.quant.record import Quantized
from tests.support.export_models import assert_same_records


@pytest.fixture
def saved(tmp_path, small_net, quantize, scheme_of):
    return save(quantize(small_net, scheme_of("W8A8")), tmp_path / "out")


@pytest.mark.parametrize("name", ["W8A8", "static", "W3"])
def test_any_module_comes_back_exactly(tmp_path, small_net, quantize, scheme_of, name):
    scheme = scheme_of("", num_bits=3, group_size=32, symmetric=False) if name == "W3" else scheme_of(name)
    dense = copy.deepcopy(small_net)
    quantize(small_net, scheme)
    x = torch.randn(5, 64)
    save(small_net, tmp_path / "out")
    for p in dense.parameters():
        p.data.normal_()
    again = load(tmp_path / "out", dense, packed=False)
    assert again is dense
    assert_close(again(x), small_net(x), rtol=0, atol=0)
    assert_close(again.state_dict(), small_net.state_dict(), rtol=0, atol=0)
    assert_same_records(small_net, again)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() == {"quantization_config"}
    assert config["quantization_config"]["quantization_status"] == "compressed"


def test_load_needs_the_model_when_it_is_not_hugging_faces(saved):
    with pytest.raises(ValueError, match=r"no Hugging Face model; build the dense model and call load\(folder, m"):
        load(saved, packed=False)


def test_load_of_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; is it a folder that save wrote"):
        load(tmp_path, packed=False)


def test_load_of_a_model_that_another_method_quantized(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"was quantized by gptq, expected compressed-tensors; load it with transform"):
        load(tmp_path, packed=False)


def test_load_without_the_weights(saved, small_net):
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no model.safetensors; is it a folder that save wrote, and copied completely"
    ):
        load(saved, small_net, packed=False)


def test_load_into_another_model(saved, small_net):
    with pytest.raises(ValueError, match=r"the model lacks \['3.bias'.*the folder lacks \[\]; build the model as"):
        load(saved, nn.Sequential(*small_net[:3]), packed=False)
    with pytest.raises(ValueError, match=r"'5' is quantized, but the files in .* lack its weight"):
        load(saved, nn.Sequential(*small_net, nn.Linear(8, 8)), packed=False)
    with pytest.raises(ValueError, match=r"torch.float32 .* in /.*out, torch.bfloat16 .* in the model; build it"):
        load(saved, copy.deepcopy(small_net).to(torch.bfloat16), packed=False)
    with pytest.raises(ValueError, match="not on meta"):
        load(saved, copy.deepcopy(small_net).to("meta"), packed=False)


def test_load_of_a_newer_format(saved, small_net):
    (saved / "lightning_compress.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="has format_version 2, expected 1"):
        load(saved, small_net, packed=False)


def rewrite(folder, **changed):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name]) for name, change in changed.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("3.bias", lambda t: t * torch.nan, "NaN or Inf in 1 parameters or buffers, such as 3.bias"),
        ("3.running_var", lambda t: t - torch.inf, "NaN or Inf in 1 parameters or buffers, such as 3.running_var"),
        ("0.weight_scale", lambda t: -t, "model.safetensors, '0': '0': its scale is not finite and positive"),
        ("0.weight_scale", lambda t: t * torch.nan, "model.safetensors, '0': '0': its scale is not finite"),
        ("0.weight_scale", lambda t: t[1:].clone(), "model.safetensors, '0': "),
        ("0.weight", lambda t: t[1:].clone(), r"'0': its weight is \[31, 64\] in the file, and in the model"),
    ],
    ids=["NaN bias", "Inf variance", "negative scale", "NaN scale", "too few scales", "too few rows"],
)
def test_load_of_numbers_that_cannot_be(saved, small_net, name, change, message):
    """The model that was given stays as it is."""
    rewrite(saved, **{name: change})
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(ValueError, match=rf"{saved}.*{message}"):
        load(saved, small_net, packed=False)
    assert_close(small_net.state_dict(), before, rtol=0, atol=0)


def test_load_into_a_hugging_face_model_that_is_there(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(), scheme_of("W4A16"), ["lm_head"])
    save(model, tmp_path / "out")
    fresh = tiny_llama()
    for p in fresh.parameters():
        p.data.zero_()
    assert load(tmp_path / "out", fresh, packed=False) is fresh
    assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_same_records(model, fresh)
    on_cpu = load(tmp_path / "out", device="cpu", packed=False)
    assert all(record.scale.device.type == "cpu" for _, record in Quantized.find(on_cpu).values())


def test_load_in_bfloat16(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(torch.bfloat16), scheme_of("", num_bits=8, group_size=64, symmetric=False))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", packed=False)
    assert again.dtype == torch.bfloat16
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_same_records(model, again)


def test_a_detached_model_is_dense_again(saved, small_net):
    for module, _ in Quantized.find(small_net).values():
        Quantized.detach(module)
    folder = save(small_net, saved.parent / "dense")
    assert (folder / "config.json").read_text() == "{}\n"
    assert_close(load_file(folder / "model.safetensors"), dict(small_net.state_dict()), rtol=0, atol=0)
