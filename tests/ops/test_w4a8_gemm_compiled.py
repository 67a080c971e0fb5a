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

from lightning_compress.ops.w4a8_gemm.kernel import codes_kernel, constants, dense_kernel, w4a8_kernel
from tests.ops.test_w4a16_gemm_compiled import least_in_flight
from tests.ops.test_w8a8_gemm_compiled import CORE
from tests.support.triton_compilation import SHARED, compiled, inspect_code, loops, products_before_use

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = {  # M, groups of K=4096, codes of tokens; instructions on sm_80, which has no e4m3, and on others, and of the
    # loop on sm_90: the most that Triton 3.6.0 and 3.9.0 made, and 5 %
    "few": (16, 32, "e4m3", 1495, 835, 191),
    "32": (32, 32, "e4m3", 1990, 930, 198),
    "64": (64, 32, "e4m3", 3120, 1240, 226),
    "many": (511, 32, "e4m3", 4400, 1260, 256),
    "32-columns": (16, 128, "e4m3", 1130, 790, 172),
    "channel": (16, 1, "e4m3", 1480, 775, 165),
    "int8-few": (16, 32, "int8", 800, 810, 203),
    "int8-many": (511, 32, "int8", 1060, 1060, 333),
}
KIND = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.mark.parametrize(("case", "capability"), [*product(CASES, (80, 90)), ("few", 89), ("many", 89)], ids=str)
def test_compiles_without_spills_and_with_tensor_cores(case, capability, tmp_path):
    M, groups, kind, *budgets = CASES[case]
    launch = rule(M, 4096, 4096, torch.bfloat16, processors=132)
    types = {
        "codes_ptr": "*i8", "scale_m_ptr": "*fp32", "planes_ptr": "*i8", "scale_ptr": "*bf16",
        "out_ptr": "*bf16", "parts_ptr": "*fp32", "counter_ptr": "*i32",
    }  # fmt: skip
    missing = ["parts_ptr", "counter_ptr"] if launch.split == 1 else []
    fixed = constants(launch, groups, 4096, KIND[kind], capability >= 89) | dict.fromkeys(missing)
    kernel = compiled(w4a8_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("M",))
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code["hazards"] == 0, code
    assert code[CORE[capability, kind]], code
    assert kind == "int8" or not code["conversions"], code  # of integers to floats: bits are placed
    assert code["instructions"] <= budgets[capability > 80], code
    (loop,) = loops(kernel, tmp_path)
    if capability == 90:
        assert len(loop) <= budgets[2], len(loop)
    if groups > 1:  # scales are loaded half a block before their use, at least
        assert products_before_use(loop) >= sum(f" {CORE[capability, kind]}." in line for line in loop) // 2, loop


@pytest.mark.parametrize("kind", KIND)
def test_decoding_keeps_24_kb_of_weights_in_flight(kind, tmp_path):
    types = {"codes_ptr": "*i8", "scale_m_ptr": "*fp32", "planes_ptr": "*i8", "scale_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16", "parts_ptr": "*fp32", "counter_ptr": "*i32"}

    def build(launch):
        missing = ["parts_ptr", "counter_ptr"] if launch.split == 1 else []
        fixed = constants(launch, 32, 4096, KIND[kind], native=True) | dict.fromkeys(missing)
        return compiled(w4a8_kernel, 90, types, fixed, launch.warps, launch.stages, odd=("M",))

    assert least_in_flight(build, 16, tmp_path) >= 24 << 10


@pytest.mark.parametrize(("group", "plane"), [(128, 64), (32, 32)])
@pytest.mark.parametrize("capability", [80, 90])
def test_dequantizing_is_a_plain_stream(group, plane, capability, tmp_path):
    types = {"planes_ptr": "*i8", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
    fixed = {"GROUP": group, "PLANE": plane, "INTERPRETED": False, "BLOCK_N": 64}
    code = inspect_code(compiled(dense_kernel, capability, types, fixed, 4), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    wide = 10 if plane == 64 else 5  # 64 or 32 weights of a thread: all accesses are of 16 bytes
    assert code["wide"] == wide, code


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_unpacking_is_a_plain_stream(integer, capability, tmp_path):
    types = {"planes_ptr": "*i8", "out_ptr": "*i8"}
    fixed = {"PLANE": 64, "INTEGER": integer, "INTERPRETED": False, "BLOCK_N": 64}
    code = inspect_code(compiled(codes_kernel, capability, types, fixed, 4), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["wide"] == 6, code  # 32 bytes of a thread, two codes in each
