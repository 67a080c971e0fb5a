"""Linears of a model become packed ones, and stand-ins while a checkpoint is written."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.layers.matching import select
from lightning_compress.quant.packed import PackedLinear, as_linears, pack_linears
from lightning_compress.quant.record import Quantized
from tests.support.packed_linears import quantized_linear


def test_linears_of_a_model_are_replaced():
    model = nn.Sequential(quantized_linear("w4 g32", 64), nn.ReLU(), quantized_linear("w8 g32", 7), nn.Linear(7, 3))
    x = torch.randn(1, 5, 64)
    expected = model(x)
    assert pack_linears(copy.deepcopy(model), served=True).names == ()  # float32 tokens: no backend
    assert pack_linears(model).names == ("0", "2")
    assert [type(m) for m in model] == [PackedLinear, nn.ReLU, PackedLinear, nn.Linear]
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_weight_stays_dense():
    model = nn.ModuleList([quantized_linear("w4 g32", 64), nn.Embedding(64, 64)])
    model[1].weight = model[0].weight
    packing = pack_linears(model)
    assert packing.names == ()
    assert str(packing) == "packed 0 of 1 quantized modules; 1 stay dense: their weight is shared"


def test_what_is_packed_is_not_compressed_once_more():
    model = nn.Sequential(quantized_linear("w4 g32"), nn.Linear(16, 64), quantized_linear("w4 g64"))
    pack_linears(model)
    for targets in (["Linear"], ["re:[02]"]):
        with pytest.raises(ValueError, match="'0' and 1 more hold packed weights.*load the folder with packed=False"):
            select(model, targets)
    assert list(select(model, ["Linear"], ["0", "2"])) == ["1"]


def test_stand_ins_without_memory_take_the_place_of_packed_linears_inside():
    model = nn.Sequential(quantized_linear("w4 g32"), nn.Linear(16, 3))
    pack_linears(model)
    packed = model[0]
    with as_linears(model) as tensors:
        assert (type(model[0]), model[0].weight.is_meta) == (nn.Linear, True)
        assert model[0].bias is packed.bias
        assert Quantized.of(model[0]).scheme is packed.scheme
        assert list(tensors) == ["0"]
        assert all(value is packed.stored(name) for name, value in tensors["0"].items())
    assert model[0] is packed
