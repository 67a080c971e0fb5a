"""The kernel compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.mask_2of4.kernel import FOURS, mask_kernel
from tests.support.triton_compilation import POINTER, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_without_spills_or_shared_memory(dtype, capability, tmp_path):
    types = {"score_ptr": POINTER[dtype], "out_ptr": "*u8"}
    code = inspect_code(compiled(mask_kernel, capability, types, {"BLOCK": FOURS}, 4), tmp_path)
    assert (code["spills"], code["stack"], code["shared"]) == (0, 0, 0), code  # a thread holds its groups of four
