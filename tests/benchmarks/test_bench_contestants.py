"""Others' kernels get the layout that they ask for; goals are made of measurements only; wheels are found."""

import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import contestants, goals, wheels
from benchmarks.checking import Outcome
from lightning_compress.ops.w4a16_gemm import reference

M, N, K, GROUP = 3, 16, 64, 32


@pytest.fixture
def packed():
    """x, words, scale and the product."""
    torch.manual_seed(0)
    x = torch.randn(M, K)
    words = torch.randint(-(2**31), 2**31, (N, K // 8)).int()
    scale = torch.rand(N, K // GROUP) + 0.5
    return x, words, scale, reference.gemm(x, words, scale).float()


def test_gemlite_gets_codes_and_a_zero_point(monkeypatch, packed):
    """It computes (code - zero point) * scale with codes uint8 [N, K] and scales [N, G]."""
    x, words, scale, expected = packed

    class Layer:
        def __init__(self, bits, group_size, in_features, out_features, input_dtype, output_dtype):
            assert (bits, group_size, in_features, out_features) == (4, GROUP, K, N)
            assert input_dtype == output_dtype == "bf16"

        def pack(self, codes, scales, zeros, bias):
            assert codes.dtype == torch.uint8
            assert bias is None
            self.W = (codes.float() - zeros) * scales.repeat_interleave(GROUP, 1)

        def __call__(self, x):
            return x @ self.W.t()

    tables = []
    kinds = types.SimpleNamespace(BF16="bf16")
    module = types.SimpleNamespace(
        GemLiteLinear=Layer, DType=kinds, load_config=tables.append, __file__="/g/__init__.py"
    )
    monkeypatch.setitem(sys.modules, "gemlite", module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    torch.testing.assert_close(contestants.gemlite(x, words, scale, GROUP)(), expected)
    assert tables == ["/g/configs/h100.json"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    contestants.gemlite(x, words, scale, GROUP)
    assert len(tables) == 1


def test_humming_gets_the_tensors_of_a_checkpoint(monkeypatch, packed):
    x, words, scale, expected = packed

    class Layer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
            super().__init__()
            assert (shape_n, shape_k, torch_dtype) == (N, K, torch.float32)
            assert weight_config["format"] == "pack-quantized"
            assert weight_config["group_size"] == GROUP
            self.ready = False

        def load_from_tensors(self, tensors):
            self.W = reference.dequantize(tensors["weight_packed"], tensors["weight_scale"], None, K)

        def transform(self):
            self.ready = True

        def forward(self, x):
            assert self.ready
            return x @ self.W.t()

    module = types.SimpleNamespace(HummingLayer=Layer)
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    torch.testing.assert_close(contestants.humming(x, words, scale, GROUP)(), expected)


def test_layouts_are_made_once_and_late(monkeypatch, packed):
    made = []
    monkeypatch.setattr(contestants, "gemlite", lambda *arguments: made.append(arguments) or (lambda: "product"))
    calls = contestants.int4_products(*packed[:3], GROUP)
    assert list(calls) == ["torch int4pack", "gemlite", "humming"]
    assert not made
    assert [calls["gemlite"](), calls["gemlite"]()] == ["product"] * 2
    assert len(made) == 1


@pytest.mark.parametrize("name", ["gemlite", "humming"])
def test_a_missing_wheel_is_named(monkeypatch, packed, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=name):
        getattr(contestants, name)(*packed[:3], GROUP)


KERNEL = """
def fused_gptq_block_update(work, hinv, scale, zero_point, quantized, errors, low, high, kind):
    assert (low, high, kind, zero_point) == (-8.0, 7.0, 0, None)
    assert work.shape == scale.shape == quantized.shape == errors.shape
    for j in range(work.shape[2]):
        w = work[:, :, j]
        quantized[:, :, j] = (w / scale[:, :, j]).round().clamp(low, high) * scale[:, :, j]
        errors[:, :, j] = (w - quantized[:, :, j]) / hinv[:, j, j, None]
        work[:, :, j:] -= errors[:, :, j, None] * hinv[:, None, j, j:]
"""


def test_llm_compressors_kernel_gets_its_factor_and_needs_no_more_of_it(monkeypatch, tmp_path):
    """Its package imports data sets and tuners, which need not be there; codes are those of GPTQ's other form, LDL."""
    folder = tmp_path / "llmcompressor/modifiers/gptq"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent, folder.parent.parent):
        (parent / "__init__.py").write_text("raise ImportError('this needs a lot')")
    (folder / "gptq_quantize.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "llmcompressor"]:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0)
    W, X = torch.randn(4, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    H, scale = X.t() @ X + torch.eye(6), torch.full((4, 6), 0.2)
    try:
        call = contestants.llm_compressor_block(W.float(), H.float(), scale)
        first, second = call(), call()  # the kernel writes into its input, a copy
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "llmcompressor"]:
            del sys.modules[name]
    L = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = L L^T, L upper triangular
    U = L / L.diagonal()
    Q = torch.zeros_like(W)
    for j in range(6):
        a = W[:, j] + ((W - Q)[:, :j] * U[:j, j]).sum(1)
        Q[:, j] = (a / 0.2).round().clamp(-8, 7) * 0.2
    torch.testing.assert_close(first.double(), Q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_llm_compressor_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match="No module named 'llmcompressor_not'"):
        contestants.without_parents("llmcompressor_not.modifiers.kernel")


def w4(tokens, ours, dense, other=None, rows=8192, columns=8192, floor=5.0):
    times = {"ours": ours, goals.DENSE: dense} | ({} if other is None else {"gemlite": other})
    sizes = {"M": tokens, "N": rows, "K": columns}
    return Outcome("w4a16_gemm", "", sizes, 2, times=times, floor=floor, bound="memory")


def test_goals_are_empty_without_measurements():
    found = goals.goals([Outcome("w4a16_gemm", "", {"M": 1}, 2), Outcome("pack", "")], None, None)
    assert {goal.reached for goal in found} == {None}
    assert {goal.met for goal in found} == {None}
    assert "| pack, smallest share of the copy rate | >= 85 % |  |  |" in goals.goals_table(found)
    assert "| decode of that model, batch 1, over bf16 | >= 2x |  |  |" in goals.goals_table(found)


def test_goals_are_made_of_measurements():
    outcomes = [
        w4(1, 10.0, 40.0, 12.0), w4(16, 10.0, 10.0, 5.0), w4(256, 10.0, 6.0), w4(2047, 10.0, 5.0),
        w4(2048, 10.0, 9.5),
        Outcome("w8a8_gemm", "", {"M": 16, "quantized": 1}, 2, times={"ours": 1.0, goals.FP8: 1.5}),
        Outcome("w8a8_gemm", "", {"M": 1024, "quantized": 1}, 2, times={"ours": 1.0, goals.FP8: 0.5}),
        Outcome("w8a8_gemm", "", {"M": 1024, "quantized": 0}, 2, times={"ours": 1.0, goals.FP8: 1.1}),
        Outcome("hessian", "", {}, 2, times={"ours": 1.0, goals.FP32_RESULT: 1.6, "float32": 25.0}),
        Outcome("gptq_block", "", {}, 2, times={"ours": 1.0, goals.BLOCK: 5.0}),
        Outcome("hadamard", "", {}, 0, times={"ours": 10.0}, floor=9.0, bound="memory"),
        Outcome("hadamard", "", {}, 0, times={"ours": 10.0}, floor=8.0, bound="memory"),
    ]  # fmt: skip
    table = goals.goals_table(goals.goals(outcomes, 29.0, 1.5))
    expected = [
        "| w4a16 over cuBLAS bf16, M <= 16, geometric mean | >= 2.2x | 2.00x (2 shapes) | no |",
        "| w4a16 over cuBLAS bf16, M <= 16, smallest | >= 1x | 1.00x (2 shapes) | yes |",
        "| w4a16 over the best other W4 kernel, M <= 16, geometric mean | >= 1x | 0.77x (2 shapes) | no |",
        "| w4a16 at 8192 x 8192, M <= 16, smallest share of the roofline | >= 60 % | 50.00 % (2 shapes) | no |",
        "| w4a16 at 28672 x 8192, M <= 16, smallest share of the roofline | >= 75 % |  |  |",
        "| w4a16 over cuBLAS bf16, M = 256 to 2047, smallest | >= 0.55x | 0.50x (2 shapes) | no |",
        "| w4a16 over cuBLAS bf16, M >= 2048, smallest | >= 0.9x | 0.95x (1 shapes) | yes |",
        "| w8a8 over _scaled_mm, smallest | >= 1x | 1.10x (1 shapes) | yes |",
        "| w8a8 with quantization over _scaled_mm, M <= 64, geometric mean | >= 1.3x | 1.50x (1 shapes) | yes |",
        "| Hessian over mm with float32 result, geometric mean | >= 1.5x | 1.60x (1 shapes) | yes |",
        "| Hessian over float32, geometric mean | >= 20x | 25.00x (1 shapes) | yes |",
        "| GPTQ block over llm-compressor's kernel, smallest | >= 4x | 5.00x (1 shapes) | yes |",
        "| hadamard, smallest share of the copy rate | >= 85 % | 80.00 % (2 shapes) | no |",
        "| GPTQ W4 g128 of a Llama-3-8B-shaped model, 128 x 2048 tokens | <= 30 s | 29.00 s | yes |",
        "| decode of that model, batch 1, over bf16 | >= 2x | 1.50x | no |",
    ]
    assert table[2:] == expected


def test_wheels_are_unpacked_behind_what_is_installed(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "lent-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("lent_by_a_wheel.py", "value = 3")
        program = zipfile.ZipInfo("lent_program")
        program.external_attr = 0o100755 << 16
        archive.writestr(program, "#!/bin/sh")
        archive.writestr("torch/__init__.py", "raise ImportError('not this one')")
        archive.writestr("gemlite-0.0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: gemlite\nVersion: 0.0.1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("BENCH_WHEELS", str(tmp_path))
    assert wheels.missing("torch", "lent_by_a_wheel") == ["lent_by_a_wheel"]
    assert wheels.unpacked() == ["lent-1.0-py3-none-any.whl"]
    assert wheels.missing("torch", "lent_by_a_wheel") == []
    import lent_by_a_wheel

    assert lent_by_a_wheel.value == 3
    assert os.access(os.path.join(os.path.dirname(lent_by_a_wheel.__file__), "lent_program"), os.X_OK)
    assert wheels.versions()["gemlite"] == "0.0.1"


def test_a_folder_of_wheels_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_WHEELS", str(tmp_path / "none"))
    with pytest.raises(
        SystemExit, match="none is not a folder; fetch the wheels with `make bench-wheels`, or unset it"
    ):
        wheels.unpacked()
    monkeypatch.setenv("BENCH_WHEELS", "")
    assert wheels.unpacked() == []


def test_every_goal_has_a_row_in_the_table_of_predictions():
    table = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    rows = ["| {} | {} |".format(*goal.cells()) for goal in goals.goals([], None, None)]
    assert len(rows) > 12
    assert [row for row in rows if row not in table] == []
