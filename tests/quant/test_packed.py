"""A packed Linear against the dequantized one, and against the tensors that an export writes."""

import copy
import io

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.testing import assert_close

from lightning_compress.export.packing import pack
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.packed import PackedLinear, is_packable, pack_linears
from lightning_compress.quant.record import Quantized, attach, quantized_of
from lightning_compress.quant.scales import minmax

GRIDS = {
    "g32": {"strategy": "group", "group_size": 32},
    "g32-asymmetric": {"strategy": "group", "group_size": 32, "symmetric": False},
    "g64": {"strategy": "group", "group_size": 64},
    "channel": {"strategy": "channel"},
    "channel-asymmetric": {"strategy": "channel", "symmetric": False},
    "tensor": {"strategy": "tensor"},
}
SHAPES = [(16, 64), (17, 192), (1, 64)]          # N, K


def quantized_linear(grid, N, K, dtype=torch.float32, bias=True, bits=4, seed=0):
    torch.manual_seed(N + K + seed)
    linear = nn.Linear(K, N, bias, dtype=dtype)
    args = QuantizationArgs(num_bits=bits, type="int", **grid)
    scale, zero = minmax(linear.weight.detach(), args)
    scale = scale.to(dtype)
    linear.weight.data = round_weight(linear.weight.detach(), scale, zero, args)
    attach(linear, Quantized(QuantizationScheme(targets=["Linear"], weights=args), scale, zero))
    return linear


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_equal_the_dequantized_linear(grid, N, K, bias):
    linear = quantized_linear(GRIDS[grid], N, K, bias=bias)
    packed = PackedLinear.from_quantized(linear)
    for shape in ((K,), (3, K), (2, 5, K)):
        x, again = (torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in "ab")
        y = packed(x)
        assert_close(y, linear(again), rtol=1e-5, atol=1e-5)
        y.sin().sum().backward()
        linear(again).sin().sum().backward()
        assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_bf16_tokens(grid, N, K):
    linear = quantized_linear(GRIDS[grid], N, K, torch.bfloat16)
    packed = PackedLinear.from_quantized(linear)
    assert torch.equal(packed.dense(), linear.weight)
    x = torch.randn(4, K).bfloat16()
    expected = x.double() @ linear.weight.double().t() + linear.bias.double()
    for y in (packed(x), packed(x.clone().requires_grad_()), packed(x.half()), packed(x.float())):
        assert (y.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_dict_is_what_an_export_writes(grid, dtype):
    linear = quantized_linear(GRIDS[grid], 17, 192, dtype)
    packed = PackedLinear.from_quantized(linear)
    written = pack("layer", linear, quantized_of(linear)) | {"bias": linear.bias.detach()}
    state = packed.state_dict()
    assert state.keys() == written.keys()
    for name, value in written.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    bias = written.pop("bias")
    assert torch.equal(PackedLinear(written, bias).dense(), linear.weight)


def test_what_was_prepared_follows_the_weights():
    packed, other = (PackedLinear.from_quantized(quantized_linear(GRIDS["g32"], 16, 64, seed=s)) for s in (0, 1))
    x = torch.randn(3, 64)
    assert not torch.allclose(packed(x), other(x))
    packed.load_state_dict(other.state_dict())
    assert_close(packed(x), other(x))
    copied = copy.deepcopy(packed)
    assert not copied._prepared
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert_close(torch.load(file, weights_only=False)(x), other(x))
    assert packed.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_first_call_in_inference_mode_does_not_spoil_training():
    packed = PackedLinear.from_quantized(quantized_linear(GRIDS["g32"], 17, 64))
    with torch.inference_mode():
        packed(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    packed(x).sum().backward()
    assert_close(x.grad, packed.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)


def test_linears_of_a_model_are_replaced():
    model = nn.Sequential(quantized_linear(GRIDS["g32"], 64, 64), nn.ReLU(), quantized_linear(GRIDS["channel"], 7, 64))
    model.append(nn.Linear(7, 3))
    model.append(quantized_linear(GRIDS["channel"], 8, 3, bits=8))
    x = torch.randn(5, 64)
    expected = model(x)
    assert pack_linears(model) == ["0", "2"]
    assert [type(m) for m in model] == [PackedLinear, nn.ReLU, PackedLinear, nn.Linear, nn.Linear]
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_weight_stays_dense():
    model = nn.ModuleList([quantized_linear(GRIDS["g32"], 64, 64), nn.Embedding(64, 64)])
    model[1].weight = model[0].weight
    assert pack_linears(model) == []


def test_compiles_whole():
    packed = PackedLinear.from_quantized(quantized_linear(GRIDS["g32"], 16, 64))
    x = torch.randn(3, 64)
    assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


def test_what_does_not_fit_is_refused():
    linear = quantized_linear(GRIDS["g32"], 16, 64)
    with pytest.raises(ValueError, match=r"expected x \[..., 64\], got \(2, 65\)"):
        PackedLinear.from_quantized(linear)(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="a Linear that was quantized, got Linear; compress it first"):
        PackedLinear.from_quantized(nn.Linear(4, 4))
    eight = quantized_linear(GRIDS["channel"], 16, 64, bits=8)
    assert not is_packable(eight)
    with pytest.raises(ValueError, match="4-bit integer weights by group or by row, not 8-bit int"):
        PackedLinear.from_quantized(eight)
    linear.weight.data += 0.01
    with pytest.raises(RuntimeError, match="changed after compression"):
        PackedLinear.from_quantized(linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(16, 9).int()}, r"expected weight_packed int32 \(16, 8\), got torch.int32"),
        ({"weight_scale": torch.ones(16, 3)}, r"weight_scale \[1\] or \[16, G\] with G a divisor of 64, got \(16, 3\)"),
        ({"weight_zero_point": torch.zeros(16, 2).int()}, r"weight_zero_point int32 \(2, 2\), got .* \(16, 2\)"),
        ({"weight_g_idx": torch.zeros(64)}, r"unknown are \['weight_g_idx'\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    tensors = PackedLinear.from_quantized(quantized_linear(GRIDS["g32"], 16, 64, bias=False)).state_dict()
    with pytest.raises(ValueError, match=message):
        PackedLinear(tensors | change)
