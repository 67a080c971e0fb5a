"""The tensors of a packed weight are those of compressed-tensors' own compressor."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from lightning_compress.quant.pack_int32 import compress_words
from lightning_compress.quant.scales import minmax

STRATEGIES = [{"strategy": "group", "group_size": 8}, {"strategy": "channel"}, {"strategy": "tensor"}]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["strategy"])
def test_tensors_are_those_of_compressed_tensors(strategy, bits, symmetric):
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    scale, zero = minmax(W, args)
    state = {"weight": W, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
    found, expected = compress_words(state, scheme), PackedQuantizationCompressor.compress(state, scheme)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    assert state["weight"] is W
