"""Launches by a packed Linear on a GPU that is not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from triton.runtime.jit import JITFunction

from lightning_compress.quant.packed import PackedLinear, backends, linear
from tests.support.fake_triton import fake_triton
from tests.support.packed_linears import quantized_linear

pytestmark = pytest.mark.usefixtures("triton_cache")

LAUNCHES = {"w4 g64": 1, "w4 channel-asymmetric": 1, "NVFP4A16": 1, "MXFP4A16": 1}
LAUNCHES |= {"w8a8 token": 2, "w8a8 static": 2, "FP8_DYNAMIC": 2, "W4A8 g64": 2, "W4AFP8 g64": 2}  # tokens, product
K, N = 256, 64
METADATA, POINTERS = 6, 9  # places of what hooks get, and of the first argument of the kernel


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(backends, "_on_cuda", lambda call: call.dtype.is_floating_point)
    monkeypatch.setattr(linear, "HOLDING", "cpu")
    return monkeypatch


@pytest.fixture
def looked_up(monkeypatch):
    """The kernels that Triton looked up for a launch."""
    kernels, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **kw: kernels.append(self.__name__) or run(self, *a, **kw))
    return kernels


@pytest.mark.parametrize("name", LAUNCHES)
@torch.no_grad()
def test_calls_take_one_launch_and_no_look_up(name, launches, looked_up):
    """Two with quantized inputs. What is launched later is what Triton launched first, for other tokens."""
    packed = PackedLinear.from_quantized(quantized_linear(name, N, K, torch.bfloat16, bias=False))
    xs = [torch.randn(1, 1, K).bfloat16() for _ in range(3)]
    with fake_triton() as calls:
        ys = [packed(x) for x in xs]
    count = LAUNCHES[name]
    assert len(calls) == 3 * count
    assert len(looked_up) == count
    for later in (calls[count : 2 * count], calls[2 * count :]):
        for first, other in zip(calls[:count], later, strict=True):
            assert len(first) == len(other)
            for a, b in zip(first, other, strict=True):
                same = (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, torch.Tensor) else a == b
                assert same or a is first[METADATA]
    for x, y, call in zip(xs, ys, range(3), strict=True):
        pointers = {a.data_ptr() for c in calls[call * count : (call + 1) * count] for a in c if torch.is_tensor(a)}
        assert {x.data_ptr(), y.data_ptr()} <= pointers
        assert (y.shape, y.dtype) == ((1, 1, N), torch.bfloat16)


@torch.no_grad()
def test_other_shapes_dtypes_and_alignments_are_looked_up_once(launches, looked_up):
    packed = PackedLinear.from_quantized(quantized_linear("w4 g64", N, K, torch.bfloat16, bias=False))
    buffer = torch.randn(K + 1).bfloat16()
    xs = [torch.randn(1, 1, K).bfloat16(), torch.randn(16, K).bfloat16(), torch.randn(1, K).half(), buffer[1:][None]]
    with fake_triton():
        for _ in range(2):
            for x in xs:
                packed(x)
    assert looked_up == ["w4a16_kernel"] * 4


@torch.no_grad()
def test_what_is_not_contiguous_or_moved_is_not_prepared(launches, looked_up):
    packed = PackedLinear.from_quantized(quantized_linear("w4 g64", N, K, torch.bfloat16, bias=False))
    with fake_triton() as calls:
        for _ in range(2):
            packed(torch.randn(4, 2 * K).bfloat16()[:, :K])
        assert len(looked_up) == len(calls) == 2
        x = torch.randn(4, K).bfloat16()
        planes = packed.held.operands[0]
        packed(x)
        packed.take({"weight_packed": packed.stored("weight_packed") ^ 1})
        packed(x)
    used = [call[POINTERS + 1].data_ptr() for call in calls[-2:]]
    assert used == [planes.data_ptr(), packed.held.operands[0].data_ptr()]
    assert used[0] != used[1]
