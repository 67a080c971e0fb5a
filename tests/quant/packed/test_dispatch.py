"""Calls that a dense product computes faster: which ones, and what they compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.ops.w8a8_gemm.cpu import is_exact
from lightning_compress.quant.packed import PackedLinear, dequantize
from lightning_compress.quant.packed.dispatch import is_dense_faster
from lightning_compress.quant.packed.siblings import Siblings
from lightning_compress.quant.record import Quantized
from tests.support.packed_linears import quantized_linear

needs_int8 = pytest.mark.skipif(not is_exact(), reason="this CPU has no VNNI: int8 products are made dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qlinear", "qconv"])
def test_more_tokens_and_larger_weights_never_turn_an_int8_product_dense_again(name, dtype):
    sizes = [2**n for n in range(12)]
    for N in sizes:
        packed = [not is_dense_faster(name, dtype, M, N, N) for M in sizes]
        assert packed == sorted(packed)


def test_weights_of_4_bits_are_read_for_few_tokens_and_unpacked_for_many():
    ways = [is_dense_faster("_weight_int4pack_mm_for_cpu", torch.bfloat16, M, 1536, 576) for M in (1, 4, 16, 128)]
    assert ways == [False, False, True, True]


def test_kinds_without_measured_constants_stay_as_they_are():
    assert not is_dense_faster("w8a8_linear", torch.float32, 1, 8, 8)
    assert not is_dense_faster("qlinear", torch.float16, 1, 8, 8)


@needs_int8
@pytest.mark.parametrize("inputs", ["token", "static", "static-asymmetric"])
def test_a_call_of_few_tokens_is_the_dense_product_of_clipped_inputs(inputs):
    linear = quantized_linear(f"w8a8 {inputs}", 256, 256)
    packed = PackedLinear.from_quantized(linear)
    packed.fastest = True
    x = 5 * torch.randn(1, 256)
    clipped = x
    if (scale := packed.optional("input_scale")) is not None:
        zero = packed.optional("input_zero_point")
        steps = x / scale + (0 if zero is None else zero)
        clipped = (steps.clamp(-128, 127) - (0 if zero is None else zero)) * scale
        assert not torch.equal(clipped, x)
    with torch.no_grad():
        assert_close(packed(x), F.linear(clipped, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
        many = torch.randn(1, 256, 256)
        exact = PackedLinear.from_quantized(linear)
        assert torch.equal(packed(many), exact(many))
        assert torch.equal(copy.deepcopy(packed)(x), packed(x))


@pytest.fixture
def folder(tmp_path):
    """Linears of two sizes: the small one is never worth packing, the large one is for many tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    compress(model, QuantizationModifier(scheme="W8A8"))
    return save(model, tmp_path / "out")


def sequence():
    return nn.Sequential(nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 8)).eval()


@needs_int8
def test_load_fastest_leaves_small_linears_dense_without_rounding_their_inputs(folder, tmp_path):
    model = load(folder, sequence(), dispatch="fastest")
    assert [type(m) for m in model] == [nn.Linear, PackedLinear, nn.Linear]
    x = torch.randn(4, 32)
    dense = load(folder, sequence(), packed=False)
    dequantize(dense)
    with torch.no_grad():
        assert_close(model(x), dense(x), rtol=1e-5, atol=1e-6)
        again = load(folder, sequence(), dispatch="fastest")
        assert torch.equal(model(x), again(x))
    assert Quantized.of(model[0]) is not None
    copied = save(model, tmp_path / "copy")
    assert (copied / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@needs_int8
def test_siblings_choose_together_and_few_tokens_are_a_dense_product_of_each():
    torch.manual_seed(0)
    linears = [quantized_linear("w8a8 token", N, 256, seed=N) for N in (192, 64)]
    pair = nn.ModuleList([PackedLinear.from_quantized(linear) for linear in linears])
    group = Siblings(list(pair))
    for layer in pair:
        layer.fastest, layer.siblings = True, group
    few, many = torch.randn(1, 2, 256), torch.randn(1, 256, 256)
    assert (group.is_best_dense(few), group.is_best_dense(many)) == (True, False)
    with torch.no_grad():
        for layer, linear in zip(pair, linears, strict=True):
            assert_close(layer(few), F.linear(few, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
            assert_close(layer(many), PackedLinear.from_quantized(linear)(many), rtol=1e-5, atol=1e-5)
    assert pair[0].siblings is group  # not dissolved


@needs_int8
def test_by_default_every_linear_rounds_its_inputs(folder):
    model, exact = load(folder, sequence()), load(folder, sequence(), packed=False)
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert_close(model(x), exact(x), rtol=1e-5, atol=1e-5)


def test_a_dispatch_of_another_name_is_refused(folder):
    with pytest.raises(ValueError, match="dispatch must be one of packed, fastest, got 'quick'"):
        load(folder, sequence(), dispatch="quick")


def test_fastest_is_refused_where_nothing_is_packed(folder):
    with pytest.raises(ValueError, match="nothing is packed with packed=False.*leave dispatch out"):
        load(folder, sequence(), packed=False, dispatch="fastest")
