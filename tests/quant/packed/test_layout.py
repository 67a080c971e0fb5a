"""Tensors that do not fit a scheme are refused."""

import pytest
import torch

from lightning_compress.quant.packed import PackedLinear
from tests.support.packed_linears import quantized_linear


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
