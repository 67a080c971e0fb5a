"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from benchmarks.tuned_ops import build_hessian
from lightning_compress.ops.hessian.kernel import add_pieces_kernel, two_parts_kernel
from lightning_compress.ops.hessian.launch import rule
from tests.support.triton_compilation import SHARED, TENSOR_CORES, compiled, inspect_code

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


@pytest.mark.parametrize(("C", "capability", "descriptors", "sums"), [
    (4096, 80, False, torch.float64), (4224, 90, False, torch.float64), (4096, 90, True, torch.float32),
    (14336, 90, True, torch.float64), (4096, 100, True, torch.float64),
], ids=str)  # fmt: skip
def test_float32_costs_a_few_instructions_more(C, capability, descriptors, sums, tmp_path):
    """Of the loop, which chooses two rows in place of one; registers are within those of a bf16 program."""
    launch = rule(3 * 2048, C, 132, descriptors, wide=capability == 90)
    dtype = torch.bfloat16
    code, plain = (inspect_hessian(launch, capability, dtype, sums, tmp_path, parts) for parts in (True, False))
    assert code["instructions"] <= 1.1 * plain["instructions"] + 40, (code, plain)
    assert code["registers"] <= max(plain["registers"] + 16, 128), (code, plain)
    assert [code[name] for name in TENSOR_CORES] == [plain[name] for name in TENSOR_CORES]
    assert code["UTMALDG"] == plain["UTMALDG"]


@pytest.mark.parametrize("capability", [80, 90])
def test_splitting_float32_is_a_plain_stream(capability, tmp_path):
    types = {"x_ptr": "*fp32", "parts_ptr": "*bf16"}
    fixed = {"INTERPRETED": False, "BLOCK_N": 16, "BLOCK_C": 128, "stride_c": 1}
    code = inspect_code(compiled(two_parts_kernel, capability, types, fixed, 4, odd=("N",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] == 8, code  # 16 numbers of a thread: four loads, four stores of 16 bytes


def inspect_hessian(launch, capability, dtype, sums, folder, parts=False):
    kernel = build_hessian(launch, capability, dtype, sums, parts)
    code = inspect_code(kernel, folder)
    assert (code["spills"], code["stack"], code["hazards"]) == (0, 0, 0), code
    assert code["shared"] <= SHARED[capability], code
    return code


def test_adding_pieces_compiles(tmp_path):
    types = {"h": "*fp64", "pieces_ptr": "*fp32"}
    fixed = {"BLOCK_I": 128, "BLOCK_J": 256, "ROWS": 16}
    code = inspect_code(compiled(add_pieces_kernel, 90, types, fixed, 4, odd=("uncut", "pieces")), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] >= 4, code
