"""Every op: one graph under torch.compile and torch.export, and the result of torch where no kernel runs.

A GPU is simulated: tensors report that they are on one, and the kernels cannot run for the reason under test.
"""

import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops import availability
from lightning_compress.ops.fake_quant import Codes, learned_step, straight_through
from lightning_compress.ops.group_quant import group_quant, group_round
from lightning_compress.ops.hadamard import hadamard_transform
from lightning_compress.ops.hessian import hessian_accumulate_
from lightning_compress.ops.mask_2of4 import mask_2of4
from lightning_compress.ops.pack import pack, unpack
from lightning_compress.ops.scale_search import scale_search, scale_sweep
from lightning_compress.ops.w4a16_gemm import w4a16_gemm
from lightning_compress.ops.w8a8_gemm import quantize_tokens, w8a8_gemm

ROWS = torch.export.Dim("rows", min=2)
CODES = torch.arange(-8, 8).repeat(3, 4).to(torch.int8)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
PLANES, SCALE = torch.arange(320).view(5, 64).short()[:, :32].contiguous(), torch.full((2, 5), 0.1)

CALLS = {  # folder: functions of one tensor, whose rows may be any number, and that tensor
    "fake_quant": [
        (lambda W: straight_through(W, torch.full((1,), 0.1), None, Codes(-8, 7)), X),
        (lambda W: learned_step(W, torch.full((1,), 0.1), None, Codes(-8, 7)), X),
    ],
    "group_quant": [(lambda W: group_quant(W, 32, 4)[:2], X), (lambda W: group_round(W, 32, 4, False), X)],
    "hadamard": [(lambda x: hadamard_transform(x, None, 0.125), X)],
    "hessian": [(lambda x: hessian_accumulate_(torch.zeros(64, 64), x).tril(), X.half())],
    "mask_2of4": [(mask_2of4, X)],
    "pack": [(lambda codes: pack(codes, 4), CODES), (lambda words: unpack(words, 5, 6), CODES[:, :1].int())],
    "scale_search": [
        (lambda W: scale_search(W, torch.ones(64), 32, 4, False), X),
        (lambda W: scale_sweep(W, W.abs().unflatten(1, (2, 32)).amax(2), torch.ones(64), 4), X),
    ],
    "w4a16_gemm": [(lambda x: w4a16_gemm(x, PLANES, SCALE), X)],
    "w8a8_gemm": [
        (quantize_tokens, X),
        (lambda codes: w8a8_gemm(codes, codes[:, 0].float(), CODES, torch.ones(3), torch.float32), CODES),
    ],
}
EACH = [pytest.param(*call, id=f"{op}-{i}") for op, calls in CALLS.items() for i, call in enumerate(calls)]


class Layer(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_every_folder_is_here():
    folders = {path.parent.name for path in Path(availability.__file__).parent.glob("*/kernel.py")}
    assert folders >= set(CALLS)


@pytest.mark.parametrize(("function", "x"), EACH)
def test_compiles_and_exports_whole(function, x):
    torch.compiler.reset()  # one code object, compiled for every op
    expected = function(x)
    assert_close(torch.compile(Layer(function), fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(Layer(function), (x,), dynamic_shapes=({0: ROWS},)).module()
    more = torch.cat([x, x[1:]])
    assert_close(exported(more), function(more))


def missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return "Triton is not installed"


def too_old(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(availability, "triton_version", lambda: (3, 5))
    return r"Triton 3\.5 is older than 3\.6 \(pip install -U triton\)"


def old_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(availability, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "T4")
    return "T4 is older than compute capability 8.0"


@pytest.mark.parametrize("hindrance", [missing, too_old, old_gpu])
@pytest.mark.parametrize(("function", "x"), EACH)
def test_without_a_kernel_torch_computes_the_result_and_warns_once(function, x, hindrance, monkeypatch):
    expected = function(x)
    reason = hindrance(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with monkeypatch.context() as played:
            played.setattr(torch.Tensor, "is_cuda", True, raising=False)
            results = [function(x) for _ in range(2)]
    for result in results:
        assert_close(result, expected)
    messages = [str(w.message) for w in caught if "without a fused kernel" in str(w.message)]
    assert len(messages) == 1, messages
    assert re.search(f"without a fused kernel: {reason}", messages[0])
