"""The kernels compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.fake_quant.kernel import WARPS, blocks, gradient_kernel, value_kernel
from tests.support.triton_compilation import POINTER, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

GRAINS = {"group": 128, "channel": 4096, "tensor": 1024}


@pytest.mark.parametrize(
    ("grain", "float_bits", "capability"),
    [*product(GRAINS, (0, 8), (80, 90)), ("group", 0, 89), ("group", 8, 100), ("group", 4, 90), ("group", 6, 100)],
    ids=str,
)
def test_compile_without_spills_and_read_16_bytes_at_a_time(grain, float_bits, capability, tmp_path):
    dtype = POINTER[torch.bfloat16]
    block_l, block_c = blocks(GRAINS[grain])
    types = dict.fromkeys(("w_ptr", "s_ptr", "out_ptr", "gradient_ptr", "of_w_ptr"), dtype) | {
        "z_ptr": "*i8", "of_lines_ptr": "*fp32", "low": "fp32", "high": "fp32", "beyond": "fp32"
    }  # fmt: skip
    fixed = {"TENSOR": grain == "tensor", "HAS_ZERO": not float_bits, "FLOAT_BITS": float_bits}
    fixed |= {"z_ptr": None} if float_bits else {}
    fixed |= {"BLOCK_L": block_l, "BLOCK_C": block_c}
    learned = {"INCLUSIVE": False, "OF_W": True, "OF_SCALE": True}
    for kernel, more in ((value_kernel, {"THROUGH_BF16": float_bits in (4, 6)}), (gradient_kernel, learned)):
        code = inspect_code(compiled(kernel, capability, types, fixed | more, WARPS), tmp_path)
        assert (code["spills"], code["stack"]) == (0, 0), code
        assert code["registers"] <= 128, code  # four programs of four warps to a processor
        assert code["wide"] >= 2, code
