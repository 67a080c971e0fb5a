"""The kernels compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.w8a8_gemm.kernel import gemm_kernel, quantize_kernel, rule
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

CORE = {     # of int8 and e4m3; below 8.9 e4m3 is multiplied as fp16
    (80, "int8"): "IMMA", (89, "int8"): "IMMA", (90, "int8"): "IGMMA",
    (80, "e4m3"): "HMMA", (89, "e4m3"): "QMMA", (90, "e4m3"): "QGMMA",
}  # fmt: skip
FORMS = {  # M, codes, fused, one scale per token, computed by the kernel
    "1": (1, "int8", False, False),
    "64": (64, "int8", False, False),
    "512": (512, "int8", False, False),
    "int8-fused": (8, "int8", True, True),
    "e4m3-1": (1, "e4m3", False, False),
    "e4m3-64": (64, "e4m3", False, False),
    "e4m3-512": (512, "e4m3", False, False),
    "e4m3-fused": (8, "e4m3", True, True),
    "e4m3-fused-static": (8, "e4m3", True, False),
}


@pytest.mark.parametrize(
    ("form", "capability"), [*product(FORMS, (80, 90)), ("e4m3-64", 89), ("e4m3-fused", 89)], ids=str
)
def test_products_compile_without_spills_and_with_tensor_cores(form, capability, tmp_path):
    M, kind, fused, dynamic = FORMS[form]
    launch = rule(M, 4096, 4096, 132)
    single = launch.split == 1
    types = {
        "x_ptr": "*bf16" if fused else "*i8", "weight_ptr": "*i8", "scale_m_ptr": "*fp32", "scale_n_ptr": "*fp32",
        "out_ptr": POINTER[torch.bfloat16 if single else torch.int32 if kind == "int8" else torch.float32],
        "half_range": "fp32", "epsilon": "fp32",
    }  # fmt: skip
    fixed = {
        "FUSED": fused, "DYNAMIC": dynamic, "INTEGER": kind == "int8", "NATIVE": capability >= 89, "INTERPRETED": False,
        "WHOLE": single, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
    }  # fmt: skip
    odd = ("M", "step_m", "step_n")
    code = inspect_code(compiled(gemm_kernel, capability, types, fixed, launch.warps, launch.stages, odd), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code[CORE[capability, kind]], code
    assert code["wide"] >= 4, code


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_quantizing_tokens_compiles_without_spills(capability, integer, tmp_path):
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "half_range": "fp32", "epsilon": "fp32"}
    fixed = {"INTEGER": integer, "BLOCK": 4096}
    code = inspect_code(compiled(quantize_kernel, capability, types, fixed, 8), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] >= 2, code
