"""A packed Linear against the Linear that it was made of, for every kind of scheme, and what an export writes."""

import copy
import io

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from torch.testing import assert_close

from lightning_compress.quant.packed import PackedLinear, is_packable
from lightning_compress.quant.packing import pack
from lightning_compress.quant.record import Quantized
from tests.support.packed_linears import COLUMNS, INT4, INT8, SCHEMES, SHAPES, quantized_linear, tokens


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_linear_it_was_made_of(name, bias):
    linear = quantized_linear(name, bias=bias)
    packed = PackedLinear.from_quantized(linear)
    assert torch.equal(packed.dense(linear.weight.dtype), linear.weight)
    for shape in ((COLUMNS,), (3, COLUMNS), (1, 1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)):
        x = tokens(*shape) if shape[0] else torch.empty(shape)
        with torch.no_grad():
            assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_passes_the_rounding_of_inputs(name):
    """To x it is that of the weight alone, g W, and to the bias the sum of g."""
    linear = quantized_linear(name)
    packed = PackedLinear.from_quantized(linear)
    x = tokens(2, 5, COLUMNS).requires_grad_()
    y = packed(x)
    assert_close(y, linear(x.detach()), rtol=1e-5, atol=1e-5)
    y.sin().sum().backward()
    assert_close(x.grad, y.detach().cos() @ linear.weight.detach(), rtol=1e-4, atol=1e-5)
    assert_close(packed.bias.grad, y.detach().cos().sum((0, 1)))


@pytest.mark.parametrize("grid", INT4)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_odd_shapes(grid, N, K):
    linear = quantized_linear(f"w4 {grid}", N, K)
    x = tokens(2, 3, K)
    assert_close(PackedLinear.from_quantized(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*(f"w4 {grid}" for grid in INT4), "w8 channel", *INT8, "FP8", "NVFP4"])
def test_bf16_tokens(name):
    linear = quantized_linear(name, 32, 64, torch.bfloat16)
    packed = PackedLinear.from_quantized(linear)
    assert torch.equal(packed.dense(torch.bfloat16), linear.weight)
    for M in (1, 4, 40):
        x = tokens(1, M, 64, dtype=torch.bfloat16)
        expected = linear(x).double()
        for y in (packed(x), packed(x.clone().requires_grad_())):
            assert y.dtype == torch.bfloat16
            assert (y.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_dict_is_what_an_export_writes(name, dtype):
    linear = quantized_linear(name, dtype=dtype)
    packed = PackedLinear.from_quantized(linear)
    written = pack("layer", linear, Quantized.of(linear)) | {"bias": linear.bias.detach()}
    state = packed.state_dict()
    assert state.keys() == written.keys()
    for key, value in written.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key
    again = PackedLinear({k: v for k, v in written.items() if k != "bias"}, packed.scheme, written["bias"])
    assert torch.equal(again.dense(dtype), linear.weight)


def test_casting_a_model_leaves_its_codes_and_scales():
    for name in ("w4 g32", "FP8", "NVFP4"):
        packed = PackedLinear.from_quantized(quantized_linear(name))
        before = {key: value.clone() for key, value in packed.tensors().items()}
        packed.to(torch.bfloat16)
        assert packed.bias.dtype == torch.bfloat16
        assert packed(tokens(2, 3, COLUMNS, dtype=torch.bfloat16)).dtype == torch.bfloat16
        for key, value in packed.tensors().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])


def test_what_was_prepared_follows_the_weights():
    for name in ("w4 g32", "w8a8 token"):
        packed, other = (PackedLinear.from_quantized(quantized_linear(name, seed=s)) for s in (0, 1))
        x = tokens(1, 3, COLUMNS)
        assert not torch.allclose(packed(x), other(x))
        packed.load_state_dict(other.state_dict())
        assert_close(packed(x), other(x))
        copied = copy.deepcopy(packed)
        assert not copied._prepared
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        assert_close(torch.load(file, weights_only=False)(x), other(x))


def test_first_call_in_inference_mode_does_not_spoil_training():
    packed = PackedLinear.from_quantized(quantized_linear("w4 g32"))
    with torch.inference_mode():
        packed(torch.randn(2, COLUMNS))
    x = torch.randn(2, COLUMNS, requires_grad=True)
    packed(x).sum().backward()
    assert_close(x.grad, packed.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)


def test_an_adapter_beside_it_trains_as_beside_the_dense_linear():
    """LoRA, two layers deep, so that the lower adapter's gradient comes through the upper packed weight."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.a, self.b = nn.Parameter(tokens(4, COLUMNS) / 8), nn.Parameter(tokens(COLUMNS, 4) / 8)

        def forward(self, x):
            return self.layer(x) + x @ self.a.t() @ self.b.t()

    linears = [quantized_linear("w4 g32", COLUMNS, seed=seed) for seed in (0, 1)]
    dense = nn.Sequential(*(Adapted(linear) for linear in linears))
    packed = nn.Sequential(*(Adapted(PackedLinear.from_quantized(copy.deepcopy(linear))) for linear in linears))
    x, losses = tokens(1, 6, COLUMNS), {}
    for model in (dense, packed):
        adapters = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in "ab"]
        optimizer = torch.optim.SGD(adapters, 0.1)
        losses[model] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            losses[model].append(loss.item())
            optimizer.step()
    for mine, other in zip((packed[0].a, packed[0].b), (dense[0].a, dense[0].b), strict=True):
        assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert losses[packed] == pytest.approx(losses[dense], rel=1e-4)
    assert losses[packed][-1] < losses[packed][0]


@pytest.mark.parametrize("name", ["w4 g32", "w8a8 token", "w8 channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(name, dtype):
    torch._dynamo.reset()
    packed = PackedLinear.from_quantized(quantized_linear(name, dtype=dtype))
    x = tokens(1, 3, COLUMNS, dtype=dtype)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):  # before anything is prepared, and after eager calls
        assert_close(compiled(x), packed(x), rtol=tolerance, atol=tolerance)


def test_what_does_not_fit_is_refused():
    linear = quantized_linear("w4 g32")
    with pytest.raises(ValueError, match=r"expected x \[..., 64\], got \(2, 65\)"):
        PackedLinear.from_quantized(linear)(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="a Linear that was quantized, got Linear; compress it first"):
        PackedLinear.from_quantized(nn.Linear(4, 4))
    Quantized.of(linear).scheme.output_activations = QuantizationArgs()
    assert not is_packable(linear)
    with pytest.raises(ValueError, match="cannot hold a scheme with quantized outputs; leave the Linear dense"):
        PackedLinear.from_quantized(linear)
    Quantized.of(linear).scheme.output_activations = None
    linear.weight.data += 0.01
    with pytest.raises(RuntimeError, match="changed after compression"):
        PackedLinear.from_quantized(linear)
