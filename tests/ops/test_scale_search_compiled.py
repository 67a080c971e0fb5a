"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.scale_search import sweep
from lightning_compress.ops.scale_search.kernel import WARPS, constants, scale_search_kernel
from tests.support.triton_compilation import SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = {  # columns of a scale, symmetric, FP8, p, GPU
    "groups": (128, True, False, 2.0, 90),
    "groups-asymmetric": (64, False, False, 2.0, 80),
    "groups-by-power": (128, True, False, 2.4, 100),
    "rows": (4096, False, False, 2.0, 90),
    "rows-fp8": (4096, True, True, 2.0, 89),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills_and_keeps_a_group_in_registers(case, tmp_path):
    group, symmetric, float8, power, capability = CASES[case]
    fixed = constants(group, symmetric, float8, power) | ({"zero_ptr": None} if symmetric else {})
    types = {"w_ptr": "*bf16", "h_ptr": "*fp32", "scale_ptr": "*bf16", "zero_ptr": "*i8"} | dict.fromkeys(
        ("low", "high", "eps", "power", "first", "first_rest", "ratio", "ratio_rest", "root2", "root4"), "fp32"
    )
    code = inspect_code(compiled(scale_search_kernel, capability, types, fixed, WARPS, odd=("L", "tries")), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= min(8192, SHARED[capability]), code
    assert code["registers"] <= 128, code


@pytest.mark.parametrize(
    ("group", "bits", "e4m3", "capability"), [(16, 4, True, 100), (32, 4, False, 90), (32, 8, False, 80)]
)
def test_the_sweep_compiles_without_spills(group, bits, e4m3, capability, tmp_path):
    fixed = sweep.constants(group, bits, 2.0, e4m3) | ({} if e4m3 else {"code_ptr": None, "global_ptr": None})
    types = {"w_ptr": "*bf16", "code_ptr": "*u8", "power": "fp32"} | dict.fromkeys(
        ("scale_ptr", "h_ptr", "global_ptr", "out_ptr"), "*fp32"
    )
    code = inspect_code(compiled(sweep.scale_sweep_kernel, capability, types, fixed, sweep.WARPS, odd=("L",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["registers"] <= 96, code
