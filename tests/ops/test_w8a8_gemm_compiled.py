"""The kernels compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

import triton.language as tl

from lightning_compress.ops.availability import triton_version
from lightning_compress.ops.w8a8_gemm.kernel import gemm_kernel, quantize_kernel, rule, scale_kernel
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code, loops

pytestmark = pytest.mark.usefixtures("triton_cache")

CORE = {     # of int8 and e4m3; below 8.9 e4m3 is multiplied as fp16
    (80, "int8"): "IMMA", (89, "int8"): "IMMA", (90, "int8"): "IGMMA",
    (80, "e4m3"): "HMMA", (89, "e4m3"): "QMMA", (90, "e4m3"): "QGMMA",
}  # fmt: skip
FORMS = {  # M, codes
    "1": (1, "int8"), "64": (64, "int8"), "512": (512, "int8"),
    "e4m3-1": (1, "e4m3"), "e4m3-64": (64, "e4m3"), "e4m3-512": (512, "e4m3"),
}  # fmt: skip


def build(M, kind, capability, dtype=torch.bfloat16):
    launch = rule(M, 4096, 4096, 132)
    types = {
        "codes_ptr": "*i8", "weight_ptr": "*i8", "scale_m_ptr": "*fp32", "scale_n_ptr": "*fp32",
        "out_ptr": POINTER[dtype], "parts_ptr": "*i32" if kind == "int8" else "*fp32", "counter_ptr": "*i32",
    }  # fmt: skip
    fixed = {
        "INTEGER": kind == "int8", "NATIVE": capability >= 89, "INTERPRETED": False, "SPLIT": launch.split,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
    }  # fmt: skip
    if launch.split == 1:
        fixed |= {"parts_ptr": None, "counter_ptr": None}
    odd = ("M", "step_m", "step_n")
    return launch, compiled(gemm_kernel, capability, types, fixed, launch.warps, launch.stages, odd)


@pytest.mark.parametrize(("form", "capability"), [*product(FORMS, (80, 90)), ("e4m3-64", 89)], ids=str)
def test_products_compile_without_spills_and_with_tensor_cores(form, capability, tmp_path):
    code = inspect_code(build(*FORMS[form], capability)[1], tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code[CORE[capability, FORMS[form][1]]], code
    assert code["wide"] >= 4, code


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("M", [1, 16, 64])
def test_few_tokens_keep_enough_bytes_in_flight(M, kind, tmp_path):
    """24 KB of the weight at least for each processor of sm_90, and few instructions in the loop."""
    launch, kernel = build(M, kind, 90)
    code = inspect_code(kernel, tmp_path)
    programs = min(65536 // (code["registers"] * 32 * launch.warps), SHARED[90] // code["shared"])
    resident = min(programs, -(-64 * launch.split // 132))  # 4096 features in tiles of 64
    assert (launch.stages - 1) * launch.block_n * launch.block_k * resident >= 24 * 1024
    three_programs = 160 if triton_version() >= (3, 9) else 168  # what Triton 3.6.0 makes, and they still fit
    assert code["registers"] <= (three_programs if M == 64 else 96), code
    assert len(loops(kernel, tmp_path)[0]) <= 200


@pytest.mark.parametrize("sums", ["*i32", "*fp32"])
def test_scaling_sums_compiles_without_spills(sums, tmp_path):
    types = {"sums_ptr": sums, "scale_m_ptr": "*fp32", "scale_n_ptr": "*fp32", "out_ptr": "*bf16"}
    fixed = {"BLOCK": 1024, "step_n": 1}
    code = inspect_code(compiled(scale_kernel, 90, types, fixed, 4, odd=("step_m",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] >= 2, code


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_quantizing_tokens_compiles_without_spills(capability, integer, dynamic, tmp_path):
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "half_range": "fp32", "epsilon": "fp32"}
    fixed = {"INTEGER": integer, "DYNAMIC": dynamic, "QUOTIENT": tl.bfloat16, "BLOCK": 4096}
    code = inspect_code(compiled(quantize_kernel, capability, types, fixed, 8), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] >= 2, code
