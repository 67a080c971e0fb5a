"""A packed Linear against the Linear that it was made of, for every kind of scheme, and what an export writes."""

import copy
import io

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from torch import nn
from torch.testing import assert_close

from lightning_compress.layers.matching import select
from lightning_compress.ops.w8a8_gemm.cpu import is_exact
from lightning_compress.quant.observers import make_observer
from lightning_compress.quant.packed import PackedLinear, is_packable, pack_linears
from lightning_compress.quant.packed.backends import Call
from lightning_compress.quant.packing import pack
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.rounding import round_module

INPUTS = {
    "token": {"strategy": "token", "dynamic": True},
    "token-asymmetric": {"strategy": "token", "dynamic": True, "symmetric": False},
    "static": {"strategy": "tensor"},
    "static-asymmetric": {"strategy": "tensor", "symmetric": False},
}
WEIGHTS = {
    "g32": {"group_size": 32},
    "g32-asymmetric": {"group_size": 32, "symmetric": False},
    "g64": {"group_size": 64},
    "channel": {},
    "channel-asymmetric": {"symmetric": False},
    "tensor": {"strategy": "tensor"},
}
INT4 = list(WEIGHTS)
PRESETS = ["FP8", "FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP6A16", "MXFP8"]
PRESETS += ["W4A8 g64", "W4AFP8 g64"]
INTEGERS = [f"w{bits} {grid}" for bits in (2, 3, 5, 8) for grid in ("g32", "channel-asymmetric")]
INT8 = [f"w8a8 {inputs}" for inputs in INPUTS]
SCHEMES = [*(f"w4 {grid}" for grid in WEIGHTS), *INTEGERS, "w8 channel", *INT8, *PRESETS]
SHAPES = [(16, 64), (17, 192), (1, 64)]  # N, K
COLUMNS = 64


def scheme_named(name):
    """``w4 g32``, ``w8a8 token``, ``FP8`` or ``W4A8 g64``."""
    first, _, rest = name.partition(" ")
    if first.startswith("w"):
        bits = int(first[1])
        inputs = QuantizationArgs(num_bits=8, **INPUTS[rest]) if "a" in first else None
        grid = {} if inputs is not None else WEIGHTS[rest]
        strategy = "group" if "group_size" in grid else "channel"
        weights = QuantizationArgs(num_bits=bits, **({"strategy": strategy} | grid))
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    scheme = preset_name_to_scheme(first, ["Linear"])
    if rest:
        scheme.weights.group_size = int(rest[1:])
    return scheme


def quantized_linear(name, N=16, K=COLUMNS, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(N + K + seed)
    linear, scheme = nn.Linear(K, N, bias, dtype=dtype), scheme_named(name)
    inputs, observer = scheme.input_activations, None
    if inputs is not None and inputs.dynamic is not True:
        observer = make_observer("minmax", inputs, 0.0)
        observer.update(torch.randn(4, 8, K, dtype=dtype))
    round_module("layer", linear, scheme, "minmax", observer)
    return linear


def tokens(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


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


@pytest.mark.skipif(not is_exact(), reason="this CPU has no VNNI: int8 products are made dense")
def test_int8_takes_the_int8_product():
    packed = PackedLinear.from_quantized(quantized_linear("w8a8 token"))
    packed(tokens(1, 3, COLUMNS))
    assert list(packed._prepared) == ["qlinear"]


def test_without_vnni_int8_is_computed_dense(monkeypatch):
    """There both products of torch saturate; the result is that of the Linear all the same."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", bool)
    linear = quantized_linear("w8a8 token")
    packed, x = PackedLinear.from_quantized(linear), tokens(1, 3, COLUMNS)
    assert not is_exact()
    assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)
    assert list(packed._prepared) == ["dense torch.float32"]


CUDA = {
    "w4 g32": "w4a16_gemm",
    "w4 channel-asymmetric": "w4a16_gemm",
    "w8a8 token": "w8a8_linear",
    "w8a8 static": "w8a8_linear",
    "w8a8 token-asymmetric": None,
    "FP8": "w8a8_linear",
    "FP8_DYNAMIC": "w8a8_linear",
    "W4A8 g64": "w4a8_gemm",
    "W4AFP8 g64": "w4a8_gemm",
    "NVFP4A16": "fp4_gemm",
    "MXFP4A16": "fp4_gemm",
    "MXFP4": None,
}


@pytest.mark.parametrize("name", CUDA)
def test_ways_on_cuda(name, monkeypatch):
    """Which one is chosen; and that its operands are right, by what the op computes on this device."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", bool)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("lightning_compress.quant.packed.backends.importlib.util.find_spec", lambda name: name)
    linear = quantized_linear(name)
    packed, x = PackedLinear.from_quantized(linear), tokens(2, 5, COLUMNS)
    path = packed.path(Call("cuda", torch.float32, 3, True))
    assert (path and path.name) == CUDA[name]
    if path is not None:
        y = path.product(packed, x, path.prepare(packed)) + packed.bias
        error = (y - linear(x)).norm() / linear(x).norm()  # dense NVFP4 rounds weights to bfloat16
        assert error < (2e-3 if name == "NVFP4A16" else 1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert PackedLinear.from_quantized(linear).path(Call("cuda", torch.float32, 3, True)) is None


def test_linears_of_a_model_are_replaced():
    model = nn.Sequential(quantized_linear("w4 g32", 64), nn.ReLU(), quantized_linear("w8 g32", 7), nn.Linear(7, 3))
    x = torch.randn(1, 5, 64)
    expected = model(x)
    assert pack_linears(copy.deepcopy(model), served=True).names == ()  # float32 tokens: no way of their own
    assert pack_linears(model).names == ("0", "2")
    assert [type(m) for m in model] == [PackedLinear, nn.ReLU, PackedLinear, nn.Linear]
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_weight_stays_dense():
    model = nn.ModuleList([quantized_linear("w4 g32", 64), nn.Embedding(64, 64)])
    model[1].weight = model[0].weight
    packing = pack_linears(model)
    assert packing.names == ()
    assert str(packing) == "packed 0 of 1 quantized modules; 1 stay dense: their weight is shared"


def test_what_does_not_fit_is_refused():
    linear = quantized_linear("w4 g32")
    with pytest.raises(ValueError, match=r"expected x \[..., 64\], got \(2, 65\)"):
        PackedLinear.from_quantized(linear)(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="a Linear that was quantized, got Linear; compress it first"):
        PackedLinear.from_quantized(nn.Linear(4, 4))
    Quantized.of(linear).scheme.output_activations = QuantizationArgs()
    assert not is_packable(linear)
    with pytest.raises(ValueError, match="holds no scheme with quantized outputs; leave the Linear dense"):
        PackedLinear.from_quantized(linear)
    Quantized.of(linear).scheme.output_activations = None
    linear.weight.data += 0.01
    with pytest.raises(RuntimeError, match="changed after compression"):
        PackedLinear.from_quantized(linear)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w4 g32", {"weight_packed": torch.zeros(16, 9).int()}, r"weight_packed torch.int32 \(16, 8\), got torch"),
        ("w4 g32", {"weight_scale": torch.ones(16, 3)}, r"weight_scale \(16, 2\) of strategy group, got \(16, 3\)"),
        (
            "w4 g32-asymmetric",
            {"weight_zero_point": torch.zeros(16, 2).int()},
            r"weight_zero_point torch.int32 \(2, 2\), got .* \(16, 2\)",
        ),
        ("w4 g32", {"weight_g_idx": torch.zeros(64)}, r"unknown are \['weight_g_idx'\]"),
        ("w8a8 token", {"weight": torch.zeros(16, 64)}, r"weight torch.int8 \(16, 64\), got torch.float32 \(16, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change, message):
    packed = PackedLinear.from_quantized(quantized_linear(name, bias=False))
    with pytest.raises(ValueError, match=message):
        PackedLinear(packed.tensors() | change, packed.scheme)


def test_static_inputs_need_their_scale():
    packed = PackedLinear.from_quantized(quantized_linear("w8a8 static", bias=False))
    without = {key: value for key, value in packed.tensors().items() if key != "input_scale"}
    with pytest.raises(ValueError, match=r"lacking are \['input_scale'\]"):
        PackedLinear(without, packed.scheme)


def test_what_is_packed_is_not_compressed_once_more():
    model = nn.Sequential(quantized_linear("w4 g32"), nn.Linear(16, 64), quantized_linear("w4 g64"))
    pack_linears(model)
    for targets in (["Linear"], ["re:[02]"]):
        with pytest.raises(ValueError, match="'0' and 1 more hold packed weights.*load the folder with packed=False"):
            select(model, targets)
    assert list(select(model, ["Linear"], ["0", "2"])) == ["1"]
