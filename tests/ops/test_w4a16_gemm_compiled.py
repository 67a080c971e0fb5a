"""The kernel compiled for GPUs that are not there: no spills, tensor cores, shared memory within the limit, an
instruction budget. Needs the extra ``kernels`` (make test-kernels)."""

import os
from itertools import product

import pytest
import torch

from lightning_compress.ops.w4a16_gemm.launch import W4Launch, rule

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.w4a16_gemm.kernel import constants, w4a16_kernel
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code, loop_instructions

pytestmark = pytest.mark.usefixtures("triton_cache")


def kernel_for(capability: int, launch: W4Launch, groups: int, K: int, dtype, asymmetric: bool):
    """The kernel for one shape and GPU, and its machine code."""
    fixed = constants(launch, groups, K, dtype, asymmetric) | ({} if asymmetric else {"zero_ptr": None})
    types = {
        "x_ptr": POINTER[dtype], "planes_ptr": "*i16", "scale_ptr": POINTER[dtype], "zero_ptr": "*i8",
        "out_ptr": POINTER[dtype if launch.split == 1 else torch.float32],
    }  # fmt: skip
    odd = ("M", "blocks_per_split")
    return compiled(w4a16_kernel, capability, types, fixed, launch.warps, launch.stages, odd)


CASES = {  # M, groups of K=4096, dtype, asymmetric; instructions: the most that Triton 3.9.0 made, and 5 %
    "few": (16, 32, torch.bfloat16, False, 520),
    "few-fp16-asymmetric": (16, 32, torch.float16, True, 530),
    "32-columns": (32, 128, torch.bfloat16, True, 790),
    "channel": (1, 1, torch.bfloat16, False, 510),
    "64": (64, 32, torch.bfloat16, False, 780),
    "many": (512, 32, torch.bfloat16, False, 1100),
    "many-asymmetric-64-columns": (512, 64, torch.bfloat16, True, 1460),
    "float32": (64, 32, torch.float32, False, 2130),
}


LOOP = {       # instructions of a thread for a tile of 128 columns, on sm_80 and sm_90: what Triton 3.9.0 made, and 5 %
    "few": (210, 245), "few-fp16-asymmetric": (265, 260), "32-columns": (499, 440), "channel": (183, 213),
    "64": (309, 276), "many": (434, 292), "many-asymmetric-64-columns": (806, 412), "float32": (1808, 1213),
}  # fmt: skip


@pytest.mark.parametrize(("case", "capability"), [*product(CASES, (80, 90)), ("many", 89)], ids=str)
def test_compiles_without_spills_and_with_tensor_cores(case, capability, tmp_path):
    M, groups, dtype, asymmetric, budget = CASES[case]
    launch = rule(M, 4096, 4096, dtype, processors=132)
    kernel = kernel_for(capability, launch, groups, 4096, dtype, asymmetric)
    code = inspect_code(kernel, tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[capability], code
    assert code["HGMMA" if capability == 90 else "HMMA"], code  # 64 features of a tile are the rows of wgmma
    assert dtype == torch.float32 or code["conversions"] <= 8, code  # of zero points; codes need none
    assert code["instructions"] <= budget, code
    loops = loop_instructions(kernel, tmp_path)
    assert len(loops) == 1, loops
    assert 100 < loops[0] <= LOOP[case][capability >= 90], loops
