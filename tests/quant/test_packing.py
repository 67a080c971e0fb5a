"""One module to disk tensors and back: exact codes, exact weights, records that must fit."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.testing import assert_close

from lightning_compress.quant import packing
from lightning_compress.quant.packing import check_fit, compress_words, pack, tensor_names, unpack
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import minmax


def on_grid(scheme, R=16, C=128, dtype=torch.float32, seed=0):
    """(Linear, record, codes): random codes and scales, weight = (code - zero) * scale as compressed-tensors has it."""
    args = scheme.weights
    torch.manual_seed(seed)
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    shape = {"tensor": (1,), "channel": (R, 1), "group": (R, C // (args.group_size or C))}[args.strategy]
    codes = torch.randint(low, high + 1, (R, C), dtype=torch.int8)
    scale = (torch.rand(shape) * 0.1 + 0.01).to(dtype)
    zero = None if args.symmetric else torch.randint(low, high + 1, shape, dtype=torch.int8)
    spread = [v if v is None or v.ndim == 1 else v.repeat_interleave(C // v.shape[1], 1) for v in (scale, zero)]
    shifted = codes.to(dtype) if zero is None else codes.to(dtype) - spread[1].to(dtype)
    linear = nn.Linear(C, R, bias=False, dtype=dtype)
    linear.weight.data = shifted * spread[0]
    return linear, Quantized(scheme, scale, zero), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_comes_back_bit_for_bit(scheme_of, dtype, bits, strategy, symmetric):
    size = {"group_size": 32} if strategy == "group" else {}
    scheme = scheme_of("", num_bits=bits, strategy=strategy, symmetric=symmetric, **size)
    linear, record, codes = on_grid(scheme, dtype=dtype)
    before = linear.weight.detach().clone()
    tensors = pack("layer", linear, record)
    weight, again = unpack(tensors, nn.Linear, scheme)
    assert torch.equal(linear.weight, before)
    assert weight.dtype == dtype
    assert torch.equal(weight, before)
    assert torch.equal(again.scale, record.scale)
    assert symmetric or torch.equal(again.zero_point, record.zero_point)
    assert symmetric == ("weight_zero_point" not in tensors)
    # two neighbouring codes of an asymmetric 8-bit grid may be one bfloat16 number; all others are unique
    if not (dtype == torch.bfloat16 and bits == 8 and not symmetric):
        assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, codes.shape), codes)


def test_every_8_bit_code_survives_bfloat16(scheme_of):
    """All scale mantissas times all codes: the quotient in bfloat16 would miss 948 of them."""
    scheme = scheme_of("", num_bits=8, strategy="channel")
    scale = (1 + torch.arange(128) / 128).to(torch.bfloat16)[:, None]
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(128, -1)
    linear = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    linear.weight.data = codes.to(torch.bfloat16) * scale
    assert int(((linear.weight / scale).round() != codes).sum()) == 948
    tensors = pack("layer", linear, Quantized(scheme, scale))
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], 8, codes.shape), codes)


def test_every_asymmetric_8_bit_value_survives_bfloat16(scheme_of):
    """Codes up to 255 from the zero point: the nearest code is not always the right one."""
    scheme = scheme_of("", num_bits=8, strategy="channel", symmetric=False)
    scale = (1 + torch.arange(128) / 128).to(torch.bfloat16)[:, None].repeat(2, 1)
    zero = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(128)[:, None]
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(256, -1)
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    linear.weight.data = (codes.to(torch.bfloat16) - zero.to(torch.bfloat16)) * scale
    weight, _ = unpack(pack("layer", linear, Quantized(scheme, scale, zero)), nn.Linear, scheme)
    assert torch.equal(weight, linear.weight)


@pytest.mark.parametrize("name", ["W4A16", "W8A8", "static"])
def test_names_dtypes_and_shapes(scheme_of, quantize, name):
    linear = nn.Linear(256, 32)
    quantize(nn.Sequential(linear), scheme_of(name))
    scheme = Quantized.of(linear).scheme
    found = {key: (value.dtype, tuple(value.shape)) for key, value in pack("0", linear, Quantized.of(linear)).items()}
    scale = torch.float32
    assert (
        found
        == {
            "W4A16": {
                "weight_packed": (torch.int32, (32, 256 * 4 // 32)),
                "weight_scale": (scale, (32, 2)),
                "weight_shape": (torch.int64, (2,)),
            },
            "W8A8": {"weight": (torch.int8, (32, 256)), "weight_scale": (scale, (32, 1))},
            "static": {
                "weight": (torch.int8, (32, 256)),
                "weight_scale": (scale, (32, 1)),
                "input_scale": (scale, (1,)),
            },
        }[name]
    )
    assert found.keys() <= set(tensor_names(nn.Linear, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_was_changed_is_named(scheme_of, dtype):
    linear, record, _ = on_grid(scheme_of("", num_bits=4, group_size=32), dtype=dtype)
    linear.weight.data[3, 5] += record.scale[3, 0] / 8
    for check in (pack, check_fit):
        with pytest.raises(RuntimeError, match=r"'layers.0.q': 1 of 2048 weights do not lie on.*compress it again"):
            check("layers.0.q", linear, record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(16, 2)}, r"its scale has shape \(16, 2\), expected \(16, 4\) \(group\)"),
        ({"zero_point": None}, "is asymmetric, but its record has no zero point"),
        ({"scale": torch.zeros(16, 4)}, "not finite and positive"),
        ({"scale": torch.full((16, 4), torch.nan)}, "not finite and positive"),
    ],
)
def test_a_record_that_cannot_be_is_named(scheme_of, change, message):
    scheme = scheme_of("", num_bits=4, group_size=32, symmetric=False)
    linear, record, _ = on_grid(scheme)
    with pytest.raises(RuntimeError, match=f"'fc': .*{message}"):
        pack("fc", linear, Quantized(**{**vars(record), **change}))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 5, groups=2), nn.Linear(36, 8)],
    ids=lambda layer: type(layer).__name__,
)
def test_any_layer_is_checked_against_its_grid(quantize, scheme_of, layer):
    scheme = scheme_of("", [type(layer).__name__], num_bits=4, strategy="channel", symmetric=False)
    quantize(nn.Sequential(layer), scheme)
    check_fit("0", layer, Quantized.of(layer))
    layer.weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"'0': .*changed after compression"):
        check_fit("0", layer, Quantized.of(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_record_survives_json_exactly(scheme_of, dtype):
    import json

    scheme = scheme_of("", num_bits=4, group_size=32, symmetric=False)
    _, record, _ = on_grid(scheme, dtype=dtype)
    again = Quantized.from_json(json.loads(json.dumps(record.to_json())))
    assert again.scheme == record.scheme
    assert_close(again.scale, record.scale, rtol=0, atol=0)
    assert_close(again.zero_point, record.zero_point, rtol=0, atol=0)
    assert again.input_scale is None


STRATEGIES = [{"strategy": "group", "group_size": 8}, {"strategy": "channel"}, {"strategy": "tensor"}]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["strategy"])
def test_packed_words_are_those_of_compressed_tensors(strategy, bits, symmetric, monkeypatch):
    monkeypatch.setattr(packing, "CACHED", 48)  # two rows at once
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
