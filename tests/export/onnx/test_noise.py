import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.export.onnx.noise import noisy_inputs
from lightning_compress.quant.record import Quantized


def test_inputs_between_two_codes_go_to_either(static8):
    """Those on a code do not move; hooks are gone afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    compress(model, QuantizationModifier(config_groups=static8()), [torch.randn(16, 64)])
    scale = Quantized.of(model[0]).input_scale.reshape(())
    codes = torch.arange(64, dtype=torch.float32) % 7 + 1
    on, between = scale * codes, scale * (codes + 0.5)
    y = model(on), model(between)
    with noisy_inputs(model):
        assert torch.equal(model(on), y[0])
        moved = (model(between) - y[1]).norm() / y[1].norm()
    assert 0.01 < moved < 1
    assert torch.equal(model(between), y[1])
