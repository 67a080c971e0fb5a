"""Scales, zero points, words and values are bit for bit those of compressed-tensors, and of the package's rounding."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from lightning_compress.ops.group_quant import group_quant, group_round
from lightning_compress.quant.fake_quant import fake_quantize_input, round_weight
from lightning_compress.quant.scales import minmax

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5, 96, 32), (3, 70, 70), (4, 1056, 1056), (2, 24, 8)]  # N, K, columns of a scale


def weight(N, K, group, dtype):
    """Ordinary numbers; a group of zeros, groups of one sign, an outlier, and the smallest number there is."""
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) * 0.02
    W[0, :group] = 0
    W[1, :group] = W[1, :group].abs()
    W[1, -group:] = -W[1, -group:].abs()
    W[-1, 3] = 0.5
    W = W.to(dtype)
    W[0, 0] = torch.finfo(dtype).smallest_normal
    return W


def grid(group, K, bits, symmetric, type="int"):
    strategy = {"strategy": "channel"} if group == K else {"strategy": "group", "group_size": group}
    return QuantizationArgs(num_bits=bits, type=type, symmetric=symmetric, **strategy)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_words_are_those_of_compressed_tensors(N, K, group, bits, symmetric):
    for dtype in DTYPES:
        W, args = weight(N, K, group, dtype), grid(group, K, bits, symmetric)
        scale, zero = minmax(W, args)
        codes = quantize(W.float(), scale.float(), zero, args, dtype=torch.int8)
        words, *result = group_quant(W, group, bits, symmetric)
        assert torch.equal(words, pack_to_int32(codes, bits))
        assert torch.equal(result[0], scale)
        assert result[0].dtype == dtype
        assert (result[1] is zero is None) or torch.equal(result[1], zero)
        value, *again = group_round(W, group, bits, symmetric)
        assert torch.equal(value, round_weight(W, scale, zero, args))
        assert torch.equal(again[0], scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_values_are_those_of_compressed_tensors(dtype):
    W, args = weight(6, 80, 80, dtype), grid(80, 80, 8, True, "float")
    scale, _ = minmax(W, args)
    value, result, zero = group_round(W, 80, float8=True)
    assert torch.equal(result, scale)
    assert zero is None
    assert torch.equal(value, round_weight(W, scale, None, args))


@pytest.mark.parametrize(("type", "symmetric"), [("int", True), ("int", False), ("float", True)])
def test_tokens_are_rounded_as_the_hook_of_a_module_does(type, symmetric):
    """In float32: compressed-tensors itself takes the codes of bf16 activations in bf16."""
    x = torch.randn(2, 7, 40)
    args = QuantizationArgs(num_bits=8, type=type, symmetric=symmetric, strategy="token", dynamic=True)
    value, scale, zero = group_round(x.view(-1, 40), 40, 8, symmetric, type == "float")
    expected = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(scale.view(2, 7, 1), expected[0])
    assert symmetric or torch.equal(zero.view(2, 7, 1), expected[1])
    assert torch.equal(value.view(x.shape), fake_quantize_input(torch.nn.Identity(), x, args, None, None))


def test_rows_may_lie_apart_and_there_may_be_none():
    W = weight(64, 6, 6, torch.float32).t()
    for result, expected in zip(group_quant(W, 32, 4), group_quant(W.contiguous(), 32, 4), strict=True):
        assert result is expected is None or torch.equal(result, expected)
    words, scale, zero = group_quant(torch.zeros(0, 64), 32, 4, False)
    assert (words.shape, scale.shape, zero.shape) == ((0, 8), (0, 2), (0, 2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_op_is_registered_soundly(symmetric):
    W = torch.randn(3, 64)
    for float8, packed in ((False, True), (symmetric, False)):
        torch.library.opcheck(torch.ops.lightning_compress.group_quant, (W, 32, 4, symmetric, float8, packed))


def test_compiles_and_exports_whole():
    class Packed(torch.nn.Module):
        def forward(self, W):
            words, scale, zero = group_quant(W, 32, 4, False)
            return words, scale, zero

    W = torch.randn(4, 64)
    expected = group_quant(W, 32, 4, False)
    exported = torch.export.export(Packed(), (W,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    for function in (torch.compile(Packed(), fullgraph=True, backend="aot_eager"), exported):
        assert all(map(torch.equal, function(W), expected))
    assert torch.equal(torch.compile(group_round, fullgraph=True, backend="aot_eager")(W, 32)[0], group_round(W, 32)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_quant(torch.zeros(2, 8).double(), 8, 4), r"W \[N, K\] in float16, .*64 \(2, 8\)"),
        (lambda: group_quant(torch.zeros(8), 8, 4), r"got torch.float32 \(8,\)"),
        (lambda: group_quant(torch.zeros(2, 8), 8, 9), "expected 2 to 8 bits, got 9"),
        (lambda: group_quant(torch.zeros(2, 8), 3, 4), "groups of 3 columns do not divide K=8"),
        (lambda: group_quant(torch.zeros(2, 0), 1, 4), "groups of 1 columns do not divide K=0"),
        (lambda: group_round(torch.zeros(2, 8), 0), "groups of 0 columns"),
        (lambda: group_round(torch.zeros(2, 8), 8, 8, False, True), "FP8 has no zero point"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
