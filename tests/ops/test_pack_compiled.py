"""The kernels compiled for GPUs that are not there. Needs the extra ``kernels`` (make test-kernels)."""

import os
from importlib.metadata import version

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from lightning_compress.ops.pack.kernel import WARPS, launch, pack_kernel, unpack_kernel
from tests.support.triton_compilation import SHARED, compiled, inspect_code

pytestmark = pytest.mark.usefixtures("triton_cache")

CASES = [(4, 4096, 80), (4, 4096, 90), (8, 4096, 89), (2, 4096, 100), (7, 4096, 90), (3, 4095, 90)]


@pytest.mark.parametrize(("bits", "C", "capability"), CASES, ids=str)
def test_compile_without_spills_and_move_16_bytes_at_a_time(bits, C, capability, tmp_path):
    P = -(-C * bits // 32)
    _, fixed, _ = launch(4096, C, P, bits)
    odd = ("G",) if C % 32 == 0 else ("G", "C", "P")
    for kernel in (pack_kernel, unpack_kernel):
        types = {"codes_ptr": "*i8", "words_ptr": "*i32"}
        code = inspect_code(compiled(kernel, capability, types, fixed, WARPS, odd=odd), tmp_path)
        assert (code["spills"], code["stack"]) == (0, 0), code
        assert code["shared"] <= min(4096, SHARED[capability]), code  # quads change places within a group
        if C % 32 == 0:
            assert code["wide"] >= 2, code
            assert code["registers"] <= 40, code  # 1536 threads to a processor
            most = 430 if version("triton").startswith("3.6.") else 400  # 3.6 takes 424 for 7 bits
            assert code["instructions"] <= (310 if bits == 4 else most), code
