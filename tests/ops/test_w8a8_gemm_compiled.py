"""The kernels compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.w8a8_gemm.kernel import gemm_kernel, quantize_kernel, rule
from tests.ops.compilation import POINTER, SHARED, compiled, facts

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("M", [1, 64, 512])
def test_products_compile_without_spills_and_with_int8_tensor_cores(M, capability, tmp_path):
    launch = rule(M, 4096, 4096, 132)
    whole = launch.split == 1
    types = {
        "codes_ptr": "*i8", "weight_ptr": "*i8", "scale_m_ptr": "*fp32", "scale_n_ptr": "*fp32",
        "out_ptr": POINTER[torch.bfloat16 if whole else torch.int32],
    }  # fmt: skip
    fixed = {"WHOLE": whole, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    found = facts(compiled(gemm_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("M",)), tmp_path)
    assert (found["spills"], found["stack"]) == (0, 0), found
    assert found["shared"] <= SHARED[capability], found
    assert found["IGMMA" if capability == 90 else "IMMA"], found
    assert found["wide"] >= 4, found


@pytest.mark.parametrize("capability", [80, 90])
def test_quantizing_tokens_compiles_without_spills(capability, tmp_path):
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "half_range": "fp32"}
    found = facts(compiled(quantize_kernel, capability, types, {"BLOCK": 4096}, 8), tmp_path)
    assert (found["spills"], found["stack"]) == (0, 0), found
    assert found["wide"] >= 2, found
