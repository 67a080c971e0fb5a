"""Packed tensors take the place of weights, shared ones once, under names without wrappers."""

import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.quant.record import Quantized
from tests.support.export_models import all_files


def test_shared_modules_and_parameters_are_written_once(tmp_path, quantize, scheme_of):
    def build():
        shared = nn.Linear(32, 32)
        model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 32), nn.Linear(32, 32))
        model[4].weight = model[3].weight
        return model

    model = quantize(build(), scheme_of("", num_bits=4, group_size=32), ["3", "4"])
    save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {n.split(".")[0] for n in names if "weight" in n} == {"0", "3"}
    x = torch.randn(4, 32)
    assert_close(load(tmp_path / "out", build(), packed=False)(x), model(x), rtol=0, atol=0)


def test_a_compiled_model_has_plain_names(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"), ["4"])
    save(small_net, tmp_path / "plain")
    save(torch.compile(small_net), tmp_path / "whole")
    for place in (0, 4):
        small_net[place] = nn.Sequential(small_net[place])
    save(small_net, tmp_path / "nested")
    for place in (0, 4):
        small_net[place] = torch.compile(small_net[place])
    save(small_net, tmp_path / "compiled")
    assert all_files(tmp_path / "plain") == all_files(tmp_path / "whole")
    assert all_files(tmp_path / "nested") == all_files(tmp_path / "compiled")


def test_an_embedding_may_be_packed(tmp_path, scheme_of):
    from lightning_compress.quant.fake_quant import round_weight
    from lightning_compress.quant.scales import minmax

    model, scheme = nn.Sequential(nn.Embedding(10, 32)).eval(), scheme_of("", ["Embedding"], num_bits=4, group_size=32)
    scale, _ = minmax(model[0].weight.data, scheme.weights)
    model[0].weight.data = round_weight(model[0].weight.data, scale, None, scheme.weights)
    Quantized(scheme, scale).attach(model[0])
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", nn.Sequential(nn.Embedding(10, 32)), packed=False)
    assert torch.equal(again[0].weight, model[0].weight)
