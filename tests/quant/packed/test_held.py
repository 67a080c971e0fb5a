"""On CUDA operands replace the tensors that they are made of: the weight is in memory once, and nothing else changes.

Here the CPU takes the part of the GPU: operands are held there, and the ops compute what they compute without a kernel.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import dequantize
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.packed import PackedLinear, backends, fuse_siblings, linear, pack_linears
from tests.support.allocations import allocated
from tests.support.packed_linears import COLUMNS, quantized_linear, tokens

WEIGHT = ["weight_packed", "weight_scale"]
REPLACED = {
    "w4 g32": WEIGHT,
    "w4 g32-asymmetric": [*WEIGHT, "weight_zero_point"],
    "w4 channel-asymmetric": [*WEIGHT, "weight_zero_point"],
    "w4 tensor": WEIGHT,
    "W4A8 g64": ["weight", "weight_scale"],
    "W4AFP8 g64": ["weight", "weight_scale"],
    "NVFP4A16": WEIGHT,
    "MXFP4A16": WEIGHT,
    "w8a8 static": [],  # its operands are the tensors of the checkpoint
    "FP8_DYNAMIC": [],
}


@pytest.fixture
def held(monkeypatch):
    """Called with a device type: operands are held there, from now on."""
    monkeypatch.setattr(backends, "_on_cuda", lambda call: call.device == "cpu" and call.dtype.is_floating_point)

    def hold(device):
        monkeypatch.setattr(linear, "HOLDING", device)

    hold("cpu")
    return hold


def checkpoint(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value.dtype, value.shape) == (second[key].dtype, second[key].shape), key
        assert torch.equal(value, second[key]), key


def pair(name, hold, **shape):
    """One that holds its operands, and one with the tensors of the checkpoint."""
    layer = quantized_linear(name, **shape)
    hold("cuda")
    plain = PackedLinear.from_quantized(layer)
    hold("cpu")
    return PackedLinear.from_quantized(layer), plain


def in_memory(layer):
    """Bytes of all tensors that a packed Linear keeps."""
    tensors = [*layer._tensors.values(), *(layer.held.operands if layer.held else ())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize(("N", "K"), [(16, COLUMNS), (24, 320)], ids=str)
def test_what_is_held_gives_the_checkpoint_back(held, name, N, K):
    packed, plain = pair(name, held, N=N, K=K)
    assert sorted(packed.held.kinds) == sorted(REPLACED[name])
    assert_equal(packed.state_dict(), plain.state_dict())
    for local, value in plain.tensors().items():
        assert torch.equal(packed.stored(local), value)
    assert torch.equal(packed.dense(), plain.dense())
    assert torch.equal(packed.weight, plain.weight)
    x = tokens(2, 3, K)
    assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, replaced in REPLACED.items() if replaced])
def test_the_weight_is_in_memory_once(held, name):
    packed, plain = pair(name, held, N=64, K=1024)
    assert in_memory(packed) <= 1.03 * in_memory(plain)  # MXFP4 has a divisor for each row


@pytest.mark.parametrize("name", REPLACED)
def test_it_may_be_copied_pickled_loaded_moved_and_cast(held, name):
    packed, _ = pair(name, held)
    other = PackedLinear.from_quantized(quantized_linear(name, seed=1))
    x, wanted = tokens(1, 3, COLUMNS), checkpoint(other)
    packed.load_state_dict(other.state_dict())
    assert_equal(checkpoint(packed), wanted)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    copies = [copy.deepcopy(packed), torch.load(file, weights_only=False), packed.double().float()]
    for layer in copies:
        assert sorted(layer.held.kinds) == sorted(REPLACED[name])
        assert torch.equal(layer(x), other(x))
    held("cuda")  # a CPU beside the GPU
    away = [copy.deepcopy(packed), packed.to("cpu")]
    for layer in away:
        assert layer.held is None
        weights = {key: value for key, value in checkpoint(layer).items() if key != "bias"}
        assert_equal(weights, {key: wanted[key] for key in weights})


def test_strict_loading_names_what_does_not_fit(held):
    packed, _ = pair("w4 g32", held)
    state = checkpoint(packed)
    state["other"] = state.pop("weight_packed")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"weight_packed".*\s.*Unexpected key\(s\).*"other"'):
        packed.load_state_dict(state)
    packed.load_state_dict(checkpoint(PackedLinear.from_quantized(quantized_linear("w4 g32", seed=1))), assign=True)
    assert torch.equal(packed.dense(), quantized_linear("w4 g32", seed=1).weight)


def test_codes_that_the_layout_cannot_hold_are_kept_beside_it(held):
    """Groups of MXFP4 whose scale is 2^40 times smaller than the largest of the row are zeros in the layout."""
    _, plain = pair("MXFP4A16", held)
    tensors = plain.tensors()
    tensors["weight_scale"][3, 0] = tensors["weight_scale"][3].max() - 40
    packed = PackedLinear(tensors, plain.scheme)
    assert packed.held.kinds == {}
    assert_equal(packed.tensors(), tensors)


@pytest.mark.parametrize("name", ["w4 g32-asymmetric", "W4A8 g64", "FP8_DYNAMIC"])
def test_members_of_a_group_share_its_codes(held, name):
    layers = {key: quantized_linear(name, seed=seed) for seed, key in enumerate("qkv")}
    net = nn.ModuleDict({key: PackedLinear.from_quantized(layer) for key, layer in layers.items()})
    states, x = {key: checkpoint(layer) for key, layer in net.items()}, tokens(2, 3, COLUMNS)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net

        def forward(self, x):
            return torch.cat([layer(x) for layer in self.layers.values()], -1)

    model = Net()
    with torch.no_grad():
        expected = model(x)
        assert fuse_siblings(model, x) == [("layers.q", "layers.k", "layers.v")]
        assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    codes = {layer._operands(layer.held.backend)[0].untyped_storage().data_ptr() for layer in net.values()}
    stacked = net["q"].siblings.stacked()
    assert codes == {stacked.held.operands[0].untyped_storage().data_ptr()}
    for key, layer in net.items():
        assert_equal(checkpoint(layer), states[key])
        separate = layer(x.clone().requires_grad_())  # with a gradient each computes its own product
        assert_close(separate, expected.split(16, -1)["qkv".index(key)], rtol=1e-5, atol=1e-5)


def test_eager_and_compiled_calls_in_turn_prepare_nothing(held, monkeypatch):
    torch._dynamo.reset()
    packed, _ = pair("w4 g32", held)
    calls = []
    prepare = backends.Int4OnCuda.prepare
    monkeypatch.setattr(backends.Int4OnCuda, "prepare", lambda self, layer: calls.append(layer) or prepare(self, layer))
    compiled, x = torch.compile(packed, fullgraph=True, backend="aot_eager"), tokens(1, 3, COLUMNS)
    for _ in range(2):
        assert_close(compiled(x), packed(x), rtol=1e-5, atol=1e-5)
    assert calls == []


def test_moving_a_model_takes_little_more_memory_than_its_folder(held, tmp_path, monkeypatch):
    """The peak of what is allocated on the target, for one module at a time, in chunks of rows."""
    held("cuda")
    monkeypatch.setattr(backends, "CHUNK", 2**12)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24)))
    compress(model, QuantizationModifier(scheme="W4A16"))
    folder = save(model, tmp_path / "net")
    packed = load(folder, nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24))), packed=True)
    held("cpu")
    peak, _, _ = allocated(lambda: packed._apply(torch.clone))  # as .to("cuda") does
    assert all(layer.held.kinds for layer in packed)
    assert peak <= 1.15 * (folder / "model.safetensors").stat().st_size


def test_a_loaded_model_is_saved_again_and_dequantized(held, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32)), torch.randn(3, 128)
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32))
    first = save(model, tmp_path / "first")
    packed = load(first, nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32)), packed=True)
    assert all(layer.held.kinds for layer in packed)
    second = save(packed, tmp_path / "second")
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert dequantize(packed) == ["0", "1"]
    assert torch.equal(packed(x), model(x))


def test_packing_a_model_in_place_holds_operands(held):
    model = nn.Sequential(quantized_linear("w4 g32", 64), nn.ReLU())
    pack_linears(model)
    assert model[0].held.kinds
    assert list(model.buffers()) == []
