"""Which backend computes a product, and that its operands are right."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.w8a8_gemm.cpu import is_exact
from lightning_compress.quant.packed import PackedLinear
from lightning_compress.quant.packed.backends import ProductCall
from tests.support.packed_linears import COLUMNS, quantized_linear, tokens


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
def test_backends_on_cuda(name, monkeypatch):
    """Which one is chosen; and that its operands are right, by what the op computes on this device."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", bool)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("lightning_compress.quant.packed.backends.importlib.util.find_spec", lambda name: name)
    linear = quantized_linear(name)
    packed, x = PackedLinear.from_quantized(linear), tokens(2, 5, COLUMNS)
    backend = packed.backend(ProductCall("cuda", torch.float32, 3, True))
    assert (backend and backend.name) == CUDA[name]
    if backend is not None:
        y = backend.product(packed, x, backend.prepare(packed)) + packed.bias
        error = (y - linear(x)).norm() / linear(x).norm()  # dense NVFP4 rounds weights to bfloat16
        assert error < (2e-3 if name == "NVFP4A16" else 1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert PackedLinear.from_quantized(linear).backend(ProductCall("cuda", torch.float32, 3, True)) is None
