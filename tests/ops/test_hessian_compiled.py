"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from benchmarks.tuned_ops import build_hessian
from lightning_compress.ops.hessian.kernel import add_pieces_kernel
from lightning_compress.ops.hessian.launch import rule
from tests.support.triton_compilation import SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("C", [512, 4096])
def test_pointers_compile_without_spills(C, capability, dtype, tmp_path):
    code = inspect_hessian(rule(16384, C, 132, descriptors=False), capability, dtype, torch.float64, tmp_path)
    assert code["HGMMA" if capability == 90 else "HMMA"], code
    assert code["wide"] >= 8, code  # 16 bytes at a time


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [4096, 4224, 14336])  # whole waves, and pieces; wide tiles
def test_descriptors_compile_without_spills(C, dtype, sums, tmp_path):
    code = inspect_hessian(rule(16384, C, 132, descriptors=True), 90, dtype, sums, tmp_path)
    assert code["HGMMA"], code
    assert code["UTMALDG"], code  # X comes by the tensor memory accelerator
    assert code["UTMAREDG"] == (4 if sums == torch.float32 else 0), code  # and float32 sums go by it


def inspect_hessian(launch, capability, dtype, sums, folder):
    kernel = build_hessian(launch, capability, dtype, sums)
    code = inspect_code(kernel, folder)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    return code


def test_adding_pieces_compiles(tmp_path):
    types = {"h": "*fp64", "pieces_ptr": "*fp32"}
    fixed = {"BLOCK_I": 128, "BLOCK_J": 256, "ROWS": 16}
    code = inspect_code(compiled(add_pieces_kernel, 90, types, fixed, 4, odd=("uncut", "pieces")), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] >= 4, code
