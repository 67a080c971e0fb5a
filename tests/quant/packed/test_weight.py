"""Who reads the weight of a packed Linear gets the dense one; who writes to it is told where to go."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.packed import PackedLinear

SCHEMES = ["W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4A16"]


def packed_and_dense(scheme, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 32, dtype=dtype))
    compress(net, QuantizationModifier(scheme=scheme))
    return PackedLinear.from_quantized(net[0]), net[0].weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reading_gives_the_dense_weight(scheme, dtype):
    layer, W = packed_and_dense(scheme, dtype)
    assert isinstance(layer, nn.Linear)
    weight, x = layer.weight, torch.randn(3, 128, dtype=dtype)
    assert (weight.shape, weight.dtype, weight.device) == (W.shape, dtype, W.device)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, W))
    assert torch.equal(x @ weight.T, x @ W.T)
    assert torch.equal(weight, W)
    assert torch.equal(weight.data.clone(), W)
    assert weight.abs().max().item() == W.abs().max().item()
    assert layer.to(torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("scheme", SCHEMES)
def test_writing_is_refused_whichever_way(scheme):
    layer, W = packed_and_dense(scheme)

    def as_peft_merges():
        layer.weight.data += torch.ones(32, 128)

    def as_peft_merges_safely():
        layer.weight.data = layer.weight.data.clone() + 1

    writers = [as_peft_merges, as_peft_merges_safely, layer.reset_parameters]
    writers += [lambda: layer.weight.mul_(2), lambda: layer.weight.__setitem__(0, 0.0)]
    for write in writers:
        with pytest.raises(ValueError, match="cannot be written.*packed=False.*lightning_compress.dequantize"):
            write()
    assert torch.equal(layer.weight, W)
