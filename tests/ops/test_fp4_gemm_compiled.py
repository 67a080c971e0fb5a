"""The kernel compiled for GPUs that are not there: no spills, tensor cores, shared memory within the limit, an
instruction budget. Needs the extra ``kernels`` (make test-kernels)."""

import os
from itertools import product

import pytest
import torch

from lightning_compress.ops.w4a16_gemm.launch import rule

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.fp4_gemm.kernel import constants, dense_kernel, fp4_kernel
from tests.ops.test_w4a16_gemm_compiled import least_in_flight
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code, loops, products_before_use

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = {  # M, columns of a group, dtype; instructions, and those of the loop for 128 columns on sm_80 and sm_90: the
    # most that Triton 3.6.0 and 3.9.0 made, and 5 %
    "nvfp4-few": (16, 16, torch.bfloat16, 975, (293, 336)),
    "nvfp4-32": (32, 16, torch.bfloat16, 1040, (316, 338)),
    "nvfp4-64": (64, 16, torch.bfloat16, 1335, (361, 345)),
    "nvfp4-many": (511, 16, torch.bfloat16, 1025, (470, 346)),
    "nvfp4-fp16": (16, 16, torch.float16, 1075, (394, 439)),
    "mxfp4-few": (16, 32, torch.bfloat16, 935, (257, 284)),
    "mxfp4-many": (511, 32, torch.bfloat16, 985, (424, 300)),
    "mxfp4-float32": (64, 32, torch.float32, 1470, (986, 620)),
}


@pytest.mark.parametrize(("case", "capability"), [*product(CASES, (80, 90)), ("mxfp4-many", 89)], ids=str)
def test_compiles_without_spills_and_with_tensor_cores(case, capability, tmp_path):
    M, group, dtype, budget, of_loop = CASES[case]
    launch = rule(M, 4096, 4096, dtype, processors=132)
    types = {
        "x_ptr": POINTER[dtype], "planes_ptr": "*i16", "scale_ptr": "*u8", "divisor_ptr": "*fp32",
        "out_ptr": POINTER[dtype], "parts_ptr": "*fp32", "counter_ptr": "*i32",
    }  # fmt: skip
    missing = ["parts_ptr", "counter_ptr"] if launch.split == 1 else []
    fixed = constants(launch, 4096 // group, 4096, dtype) | dict.fromkeys(missing)
    kernel = compiled(fp4_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("M",))
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code["hazards"] == 0, code
    assert code["HGMMA" if capability == 90 else "HMMA"], code  # 64 features of a tile are the rows of wgmma
    assert not code["conversions"], code  # of integers to floats: bits are placed
    assert ".ftz" not in kernel.asm["ptx"]  # 2^-126 times a code may be subnormal
    assert code["instructions"] <= budget, code
    (loop,) = loops(kernel, tmp_path)
    assert len(loop) <= of_loop[capability >= 90], len(loop)
    if capability == 90:  # scales are loaded half a block before their use, at least
        assert products_before_use(loop) >= sum(" HGMMA." in line for line in loop) // 2, loop


@pytest.mark.parametrize("group", [16, 32])
def test_decoding_keeps_24_kb_of_weights_in_flight(group, tmp_path):
    types = {"x_ptr": "*bf16", "planes_ptr": "*i16", "scale_ptr": "*u8", "divisor_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= {"parts_ptr": "*fp32", "counter_ptr": "*i32"}

    def build(launch):
        missing = ["parts_ptr", "counter_ptr"] if launch.split == 1 else []
        fixed = constants(launch, 4096 // group, 4096, torch.bfloat16) | dict.fromkeys(missing)
        return compiled(fp4_kernel, 90, types, fixed, launch.warps, launch.stages, odd=("M",))

    assert least_in_flight(build, 16, tmp_path) >= 24 << 10


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("capability", [80, 90])
def test_dequantizing_is_a_plain_stream(group, capability, tmp_path):
    types = {"planes_ptr": "*i16", "scale_ptr": "*u8", "divisor_ptr": "*fp32", "out_ptr": "*bf16"}
    kernel = compiled(dense_kernel, capability, types, {"GROUP": group, "INTERPRETED": False, "BLOCK_N": 64}, 4)
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] == 10, code  # 64 weights of a thread: 2 loads and 8 stores of 16 bytes
    assert ".ftz" not in kernel.asm["ptx"]  # the bits of a code are a subnormal number
    assert code["instructions"] <= 1075, code
