"""Where products with 4-bit weights are dense on CUDA: for many tokens, and where Triton would compute wrong sums."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")

from lightning_compress.ops import availability, fp4_gemm, w4a8_gemm, w4a16_gemm
from lightning_compress.ops.fp4_gemm import kernel as fp4_kernel
from lightning_compress.ops.w4a8_gemm import kernel as w4a8_kernel
from lightning_compress.ops.w4a16_gemm import kernel as w4a16_kernel
from lightning_compress.ops.w8a8_gemm import reference as tokens_reference

N, K = 24, 256
KERNELS = {"w4a16_gemm": w4a16_kernel, "fp4_gemm": fp4_kernel, "w4a8_gemm": w4a8_kernel}


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on CUDA."""

    is_cuda = True


def call(op, groups=2):
    """A function of x that calls the op with zeros as its weight."""
    if op == "fp4_gemm":
        weight = torch.zeros(N, K // 4).short(), torch.full((K // 16, N), 8).byte(), torch.ones(N)
        return lambda x: fp4_gemm._forward(x, *(t.as_subclass(OnCuda) for t in weight))
    scale = torch.ones(groups, N).bfloat16().as_subclass(OnCuda)
    if op == "w4a8_gemm":
        planes = torch.zeros(N, K // 2).char().as_subclass(OnCuda)
        return lambda x: w4a8_gemm._forward(x, planes, scale, torch.int8)
    return lambda x: w4a16_gemm._forward(x, torch.zeros(N, K // 4).short().as_subclass(OnCuda), scale, None)


@pytest.fixture
def calls(monkeypatch):
    """The kernels that are called, on a GPU of compute capability 9.0 with Triton 3.6; results are zeros."""
    names = []

    def gemm(x_MK, *rest):
        names.append("gemm")
        return x_MK.new_zeros(len(x_MK), N).bfloat16()

    def dense(*arguments):
        names.append("dense")
        return torch.zeros(N, K, dtype=arguments[-1])

    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "gemm", gemm)
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "dense", dense)
    monkeypatch.setattr(w4a8_kernel, "eight_bits", lambda *_: names.append("eight_bits") or torch.zeros(N, K).char())
    monkeypatch.setattr(
        w4a8_gemm, "w8a8_gemm", lambda codes, *_: names.append("w8a8_gemm") or codes.new_zeros(len(codes), N)
    )
    monkeypatch.setattr(w4a8_gemm, "quantize_tokens", tokens_reference.quantize_tokens)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    gpu(monkeypatch, (9, 0), (3, 6))
    return names


def gpu(monkeypatch, capability, triton):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(availability, "triton_version", lambda: triton)


@pytest.mark.parametrize("op", ["w4a16_gemm", "fp4_gemm"])
def test_from_512_tokens_the_weight_is_dequantized_by_one_kernel(op, calls):
    product = call(op)
    assert product(torch.ones(511, K).bfloat16().as_subclass(OnCuda)).shape == (511, N)
    assert calls == ["gemm"]
    assert product(torch.ones(2, 256, K).bfloat16().as_subclass(OnCuda)).shape == (2, 256, N)
    assert calls == ["gemm", "dense"]


@pytest.mark.parametrize(("groups", "dtype", "ways"), [
    (1, torch.bfloat16, ["eight_bits", "w8a8_gemm"]), (1, torch.float32, ["eight_bits", "w8a8_gemm"]),
    (2, torch.bfloat16, ["dense"]), (2, torch.float16, ["dense"]), (2, torch.float32, ["gemm"]),
], ids=str)  # fmt: skip
def test_tokens_of_eight_bits_keep_them_where_rows_have_one_scale(groups, dtype, ways, calls):
    """float32 products of cuBLAS are slower than those of 8-bit codes."""
    product = call("w4a8_gemm", groups)
    product(torch.ones(511, K).to(dtype).as_subclass(OnCuda))
    assert calls == ["gemm"]
    product(torch.ones(2, 256, K).to(dtype).as_subclass(OnCuda))
    assert calls[1:] == ways


@pytest.mark.parametrize("op", KERNELS)
def test_so_it_is_for_gradients(op, calls):
    backward = {"w4a16_gemm": w4a16_gemm, "fp4_gemm": fp4_gemm, "w4a8_gemm": w4a8_gemm}[op]._dense
    planes = torch.zeros(N, K // 4).short().as_subclass(OnCuda)
    rest = {
        "w4a16_gemm": (torch.ones(2, N), None), "fp4_gemm": (torch.ones(K // 16, N).byte(), torch.ones(N)),
        "w4a8_gemm": (torch.ones(2, N),),
    }[op]  # fmt: skip
    assert backward(planes, *rest, K, torch.bfloat16).shape == (N, K)
    assert calls == ["dense"]


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(("capability", "triton", "runs"), [
    ((10, 3), (3, 6), False), ((10, 3), (3, 8), False), ((10, 0), (3, 7), False), ((10, 3), (3, 9), True),
    ((12, 0), (3, 6), True), ((9, 0), (3, 6), True),
], ids=str)  # fmt: skip
def test_no_kernel_chains_products_where_triton_adds_them_wrongly(op, capability, triton, runs, calls, monkeypatch):
    gpu(monkeypatch, capability, triton)
    product, x = call(op), torch.ones(3, K).bfloat16().as_subclass(OnCuda)
    if runs:
        product(x)
        assert calls == ["gemm"]
        return
    expected = rf"fused kernel: Triton 3.{triton[1]} adds chained products wrongly on this GPU \(pip install"
    with pytest.warns(UserWarning, match=expected):
        product(x)
    assert "gemm" not in calls


def test_an_unknown_triton_is_tried(calls, monkeypatch):
    gpu(monkeypatch, (10, 3), None)
    call("w4a16_gemm")(torch.ones(3, K).bfloat16().as_subclass(OnCuda))
    assert calls == ["gemm"]


class Ops(TorchDispatchMode):
    """The names of the ops of torch that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [*KERNELS, "eight bits"])
def test_dequantizing_is_one_launch_of_less_than_six_bytes_per_weight(op, monkeypatch):
    kernel, launches = KERNELS.get(op, w4a8_kernel), []

    class Launches:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments))

    monkeypatch.setattr(kernel, "codes_kernel" if op == "eight bits" else "dense_kernel", Launches())
    if op in ("w4a8_gemm", "eight bits"):
        weight = torch.zeros(N, K // 2).char(), torch.ones(2, N).bfloat16()
        arguments = (*weight, K, torch.bfloat16) if op == "w4a8_gemm" else (weight[0], K, 2, torch.int8)
    elif op == "w4a16_gemm":
        weight = torch.zeros(N, K // 4).short(), torch.ones(2, N).bfloat16()
        arguments = (*weight, None, K, torch.bfloat16)
    else:
        weight = torch.zeros(N, K // 4).short(), torch.ones(K // 16, N).byte(), torch.ones(N)
        arguments = (fp4_gemm.Layout(*weight), K, torch.bfloat16)
    with Ops() as ops:
        W = (kernel.eight_bits if op == "eight bits" else kernel.dense)(*arguments)
    assert set(ops.names) <= {"aten.empty.memory_format", "aten.view.dtype", "aten.detach.default"}  # no launches
    ((grid, _),) = launches
    assert grid == (2, 1)  # each program writes 64 rows of 128 columns, and reads their words once
    assert (sum(t.nbytes for t in weight) + 2 * W.nbytes) / (N * K) < 6  # cuBLAS reads W
