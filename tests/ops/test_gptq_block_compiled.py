"""Both kernels compiled for GPUs that are not there. Triton's needs the extra ``kernels`` (make test-kernels); that in
CUDA C++ needs nvcc or NVRTC."""

import os
import re
import shutil
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops import nvrtc
from lightning_compress.ops.gptq_block import cuda
from lightning_compress.ops.gptq_block.kernel import constants, gptq_kernel
from tests.support.gptq_block_cases import GRIDS
from tests.support.triton_compilation import compiled, inspect_code, tool

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("name", ["int3 bf16", "E2M3 fp16"])
def test_triton_compiles_without_spills(name, capability, tmp_path):
    fixed = constants(128, GRIDS[name], name.startswith("int"), True)
    pointers = ("a_ptr", "q_ptr", "d_ptr", "w_ptr", "u_ptr", "scale_ptr", "zero_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"group_ptr": "*i64", "keep_ptr": "*u8", "low": "fp32", "high": "fp32"}
    odd = ("R", "b", "stride_k", "stride_j")
    code = inspect_code(compiled(gptq_kernel, capability, types, fixed, 4, odd=odd), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code


def machine_code(words, architecture, folder):
    """A cubin by nvcc; where there is none by NVRTC."""
    cubin = folder / "kernel.cubin"
    if shutil.which("nvcc"):
        (folder / "kernel.cu").write_text(cuda.SOURCE)
        command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", *words, "kernel.cu", "-o", cubin.name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return cubin
    try:
        cubin.write_bytes(nvrtc.compiled(cuda.SOURCE, [*words, f"--gpu-architecture=sm_{architecture}"]))
    except nvrtc.UnavailableError as error:
        pytest.skip(f"no nvcc here, and {error}")
    return cubin


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
@pytest.mark.parametrize(
    ("name", "zero", "keep"), [("int4", False, False), ("int3 bf16", True, True), ("none", False, True)]
)
def test_cuda_compiles_without_spills(name, zero, keep, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cubin = machine_code(cuda.options(GRIDS[name], zero, keep), architecture, tmp_path)
    resources, code = tool("cuobjdump", "-res-usage", str(cubin)), tool("nvdisasm", "-c", str(cubin))
    assert re.search(r"STACK:0\b", resources), resources
    assert not re.search(r"\b(?:STL|LDL)\b", code)
    assert int(re.search(r"REG:(\d+)", resources)[1]) <= 255
    assert len(re.findall(r"\bLDGSTS\b", code)) >= 1  # U comes past the registers
    assert "div_rn" not in code  # no division that branches


def test_sizes_that_the_launch_relies_on():
    assert f"#define THREADS {cuda.THREADS}\n" in cuda.SOURCE
    assert all(cuda.ALIGNED % int(p) == 0 for p in re.findall(r"#define PANEL (\d+)", cuda.SOURCE))
    assert cuda.SHARED <= 101376  # what a block of sm_89 may have


def test_the_reason_why_the_cuda_kernel_does_not_run(monkeypatch):
    def missing():
        raise nvrtc.UnavailableError("NVRTC is not installed")

    monkeypatch.setattr(nvrtc, "library", missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "NVRTC is not installed" in cuda.missing(torch.device("cuda:7"), GRIDS["int4"], False, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert "Old GPU is older" in cuda.missing(torch.device("cuda:8"), GRIDS["int4"], False, False)
