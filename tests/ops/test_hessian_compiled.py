"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.hessian.kernel import constants, hessian_kernel
from lightning_compress.ops.hessian.launch import rule
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("C", [512, 4096])
def test_pointers_compile_without_spills(C, capability, dtype, tmp_path):
    launch = rule(16384, C, 132, descriptors=False)
    fixed = constants(launch) | {"stride_c": 1}
    types = {"x_i": POINTER[dtype], "x_j": POINTER[dtype], "h": "*fp32"}
    kernel = compiled(hessian_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("N",))
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code["HGMMA" if capability == 90 else "HMMA"], code
    assert code["wide"] >= 8, code  # 16 bytes at a time


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_descriptors_compile_without_spills(dtype, tmp_path):
    launch = rule(16384, 4096, 132, descriptors=True)
    i, j, n = launch.block_i, launch.block_j, launch.block_n
    types = {
        "x_i": f"tensordesc<{dtype}[{n}, {i}]>", "x_j": f"tensordesc<{dtype}[{n}, {j}]>",
        "h": f"tensordesc<fp32[{i}, {j // 4}]>",
    }  # fmt: skip
    fixed = constants(launch) | {"stride_c": 1}
    code = inspect_code(compiled(hessian_kernel, 90, types, fixed, launch.warps, launch.stages, odd=("N",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[90], code
    assert code["HGMMA"], code
    assert code["UTMALDG"], code  # X comes by the tensor memory accelerator
    assert code["UTMAREDG"] == 4, code  # and the sums go by it, a quarter at a time
