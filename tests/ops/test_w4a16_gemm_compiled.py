"""The kernel compiled for GPUs that are not there: no spills, tensor cores, shared memory within the limit, an
instruction budget. Needs the extra ``kernels`` (make test-kernels)."""

import os
import re
from itertools import product

import pytest
import torch

from benchmarks.op_case import LLAMA
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, rule

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.w4a16_gemm.kernel import constants, dense_kernel, w4a16_kernel
from tests.support.triton_compilation import (
    POINTER,
    SHARED,
    compiled,
    inspect_code,
    loops,
    machine_code,
    products_before_use,
)

pytestmark = pytest.mark.usefixtures("triton_cache")


def kernel_for(capability: int, launch: W4Launch, groups: int, K: int, dtype, asymmetric: bool):
    """The kernel for one shape and GPU, and its machine code."""
    missing = ([] if asymmetric else ["zero_ptr"]) + (["parts_ptr", "counter_ptr"] if launch.split == 1 else [])
    fixed = constants(launch, groups, K, dtype, asymmetric) | dict.fromkeys(missing)
    types = {
        "x_ptr": POINTER[dtype], "planes_ptr": "*i16", "scale_ptr": POINTER[dtype], "zero_ptr": "*i8",
        "out_ptr": POINTER[dtype], "parts_ptr": "*fp32", "counter_ptr": "*i32",
    }  # fmt: skip
    return compiled(w4a16_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("M",))


PRODUCTS = re.compile(r"\bHGMMA\b")

CASES = {  # M, groups of K=4096, dtype, asymmetric; instructions: the most that Triton 3.6.0 and 3.9.0 made, and 5 %
    "few": (16, 32, torch.bfloat16, False, 790),
    "few-fp16-asymmetric": (16, 32, torch.float16, True, 860),
    "32-columns": (32, 128, torch.bfloat16, True, 1130),
    "channel": (1, 1, torch.bfloat16, False, 775),
    "64": (64, 32, torch.bfloat16, False, 1150),
    "many": (511, 32, torch.bfloat16, False, 940),
    "many-asymmetric-64-columns": (511, 64, torch.bfloat16, True, 1060),
    "float32": (64, 32, torch.float32, False, 2260),
}


LOOP = {         # instructions of a thread for a tile of 128 columns, on sm_80 and sm_90: the most of both, and 5 %
    "few": (207, 237), "few-fp16-asymmetric": (240, 288), "32-columns": (430, 440), "channel": (175, 212),
    "64": (315, 269), "many": (475, 311), "many-asymmetric-64-columns": (521, 399), "float32": (1808, 1213),
}  # fmt: skip
REGISTERS = {
    "few": (76, 76), "few-fp16-asymmetric": (84, 76), "32-columns": (150, 152), "channel": (67, 76),
    "64": (166, 162), "many": (150, 118), "many-asymmetric-64-columns": (206, 157), "float32": (236, 183),
}  # fmt: skip


@pytest.mark.parametrize(("case", "capability"), [*product(CASES, (80, 90)), ("few", 89), ("64", 89), ("many", 89)])
def test_compiles_without_spills_and_with_tensor_cores(case, capability, tmp_path):
    M, groups, dtype, asymmetric, budget = CASES[case]
    launch = rule(M, 4096, 4096, dtype, processors=132)
    kernel = kernel_for(capability, launch, groups, 4096, dtype, asymmetric)
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code["HGMMA" if capability == 90 else "HMMA"], code  # 64 features of a tile are the rows of wgmma
    assert code["hazards"] == 0, code
    assert dtype == torch.float32 or code["conversions"] <= 8, code  # of zero points; codes need none
    assert code["instructions"] <= budget, code
    assert code["registers"] <= REGISTERS[case][capability >= 90], code
    (loop,) = loops(kernel, tmp_path)
    assert 100 < len(loop) <= LOOP[case][capability >= 90], len(loop)
    if capability == 90 and groups > 1:
        assert products_before_use(loop) >= len(PRODUCTS.findall("".join(loop))) // 2, loop  # half a block, at least


@pytest.mark.parametrize("M", [16, 32])
def test_decoding_keeps_24_kb_of_weights_in_flight(M, tmp_path):
    build = lambda launch: kernel_for(90, launch, 32, 4096, torch.bfloat16, False)  # noqa: E731
    assert least_in_flight(build, M, tmp_path) >= 24 << 10


def least_in_flight(build, M, folder):
    """Bytes of 4-bit weights on their way to a processor of sm_90, the fewest of the shapes of Llamas."""
    codes, least = {}, []
    for N, K in LLAMA:
        launch = rule(M, N, K, torch.bfloat16, processors=132)
        if launch.split not in codes:
            codes[launch.split] = inspect_code(build(launch), folder)
        code = codes[launch.split]
        programs = -(-N // launch.block_n) * launch.split / 132
        resident = min((227 << 10) // (code["shared"] + 1024), 65536 // (code["registers"] * 32 * launch.warps))
        least.append(min(programs, resident) * (launch.stages - 1) * launch.block_n * 128 // 2)
    return min(least)


def test_parts_are_visible_before_they_are_counted(tmp_path):
    """What the program that adds the parts relies on, in the order of the code."""
    launch = rule(1, 4096, 4096, torch.bfloat16, processors=132)
    assert launch.split > 1
    code = machine_code(kernel_for(90, launch, 32, 4096, torch.bfloat16, False), tmp_path)
    steps = ("STG.E", "BAR.SYNC", "MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL", "STRONG.GPU R", "STG.E")
    at = code.rindex("HGMMA")
    for step in steps:
        at = code.index(step, at) + 1  # ValueError: missing, or not in this order


@pytest.mark.parametrize(
    ("group", "asymmetric", "budget"), [(128, False, 555), (128, True, 615), (32, False, 555), (0, False, 505)]
)
@pytest.mark.parametrize("capability", [80, 90])
def test_dequantizing_is_a_plain_stream(group, asymmetric, budget, capability, tmp_path):
    types = {"planes_ptr": "*i16", "scale_ptr": "*bf16", "zero_ptr": "*i8", "out_ptr": "*bf16"}
    fixed = {"GROUP": group, "HAS_ZERO": asymmetric, "INTERPRETED": False, "BLOCK_N": 64}
    kernel = compiled(dense_kernel, capability, types, fixed | ({} if asymmetric else {"zero_ptr": None}), 4)
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"], code["shared"]) == (0, 0, 0), code
    assert code["wide"] == 10, code  # 64 weights of a thread: 2 loads and 8 stores of 16 bytes
    assert code["instructions"] <= budget, code
