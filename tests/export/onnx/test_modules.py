import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.export.onnx.modules import codes_of, int4_weights, with_codes
from lightning_compress.quant.record import Quantized


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(294, 8)).eval()


def test_modules_hold_codes_inside_and_are_as_before_afterwards(static8):
    model, x = build(), torch.randn(2, 2, 8, 8)
    groups = static8(targets=["Linear", "Conv2d", "ConvTranspose2d"], num_bits=4)
    compress(model, QuantizationModifier(config_groups=groups), [x])
    expected, layers = model(x), dict(model.named_parameters())
    codes = codes_of(model)
    assert int4_weights(codes) == {"0.weight", "1.weight", "3.weight"}
    shapes = {"0": (4, 2, 3, 3), "1": (4, 6, 2, 2), "3": (294, 8)}
    with with_codes(model, codes) as reached:
        for name, shape in shapes.items():
            module = model.get_submodule(name)
            assert module._buffers["weight"].shape == shape
            assert module._buffers["weight"].dtype == torch.int8
            assert isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
            assert Quantized.of(module) is None
        assert not reached
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in layers.items()]
    assert not list(model.buffers())
    assert torch.equal(model(x), expected)
    assert [type(module) for module in model] == [type(module) for module in build()]


def test_a_weight_that_was_changed_is_refused():
    model = nn.Sequential(nn.Linear(32, 8))
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32))
    with torch.no_grad():
        model[0].weight[0, 0] += 0.01
    with pytest.raises(RuntimeError, match="'0': 1 of 256 weights do not lie on the grid"):
        codes_of(model)
