"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.hadamard.kernel import constants, hadamard_kernel, warps
from tests.support.triton_compilation import POINTER, SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = [(1, 128, torch.bfloat16), (1, 512, torch.float32), (1, 4096, torch.bfloat16), (1, 8192, torch.float16),
         (1, 16384, torch.bfloat16), (28, 128, torch.bfloat16), (12, 256, torch.float16),
         (1, 16, torch.float32), (1, 32, torch.float32), (1, 64, torch.float32)]  # fmt: skip
OTHERS = [(1, 4096, torch.bfloat16, 89), (1, 4096, torch.bfloat16, 100)]
LARGE = [(12, 512, torch.float16, 90), (28, 256, torch.float32, 90), (28, 512, torch.bfloat16, 90)]


@pytest.mark.parametrize(
    ("m", "P", "dtype", "capability"),
    [*((*case, capability) for case in CASES for capability in (80, 90)), *OTHERS, *LARGE],
    ids=str,
)
def test_compiles_without_spills_and_with_tensor_cores(m, P, dtype, capability, tmp_path):
    fixed = constants(m, P, dtype) | ({"base_ptr": None} if m == 1 else {})
    types = dict.fromkeys(("x_ptr", "base_ptr", "out_ptr"), POINTER[dtype]) | {"scale": "fp32"}
    code = inspect_code(compiled(hadamard_kernel, capability, types, fixed, warps(m, P), odd=("R",)), tmp_path)
    assert (code["spills"], code["stack"]) == (0, 0), code
    assert code["shared"] <= SHARED[89], code
    assert code["HMMA"] or code["HGMMA"] or code["UTCHMMA"], code
    assert code["wide"] >= 2, code
