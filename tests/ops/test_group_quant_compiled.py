"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.group_quant.kernel import WARPS, constants, group_quant_kernel
from tests.support.triton_compilation import SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = {  # columns of a scale, bits, symmetric, FP8, words, GPU
    "words": (128, 4, True, False, True, 90),
    "words-asymmetric": (128, 4, False, False, True, 80),
    "words-of-rows": (4096, 8, False, False, True, 89),
    "values": (128, 4, False, False, False, 100),
    "tokens-fp8": (4096, 8, True, True, False, 90),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills_and_moves_16_bytes_at_a_time(case, tmp_path):
    group, bits, symmetric, float8, packed, capability = CASES[case]
    fixed = constants(group, bits, symmetric, float8, packed) | ({"zero_ptr": None} if symmetric else {})
    types = {
        "w_ptr": "*bf16", "out_ptr": "*i32" if packed else "*bf16", "scale_ptr": "*bf16", "zero_ptr": "*i8",
        "low": "fp32", "high": "fp32", "eps": "fp32",
    }  # fmt: skip
    code = inspect_code(compiled(group_quant_kernel, capability, types, fixed, WARPS, odd=("L",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= min(8192, SHARED[capability]), code
    assert code["registers"] <= 64, code  # 1024 threads to a processor
    assert code["wide"] >= 2, code
