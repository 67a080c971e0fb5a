"""Every launch that a table holds or a rule gives compiles within the limits of its GPU. Needs the extra ``kernels``
(make test-kernels)."""

import os
import re
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from benchmarks.op_cases import LLAMA
from benchmarks.tuned_ops import SUBJECTS
from lightning_compress.ops.hessian import launch as hessian
from lightning_compress.ops.w4a16_gemm import launch as w4a16
from tests.support.triton_compilation import machine_code
from tests.support.wgmma_hazards import hazards

pytestmark = pytest.mark.usefixtures("triton_cache")

GPUS = {"A100": 80, "A10": 80, "L4": 89, "RTX 4090": 89, "H100": 90, "H200": 90, "GH200": 90, "B200": 100}
PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}


def capability_of(gpu: str) -> int:
    known = [capability for name, capability in GPUS.items() if name in gpu]
    assert known, f"say in GPUS which compute capability {gpu!r} has"
    return known[0]


def shipped():
    for op, subject in SUBJECTS.items():
        for gpu, rows in subject.table.read().items():
            for row in rows:
                shape = tuple(row["at"][name] for name in subject.sizes)
                yield op, shape, subject.table.launch_of(row), capability_of(gpu)


def ruled():
    """One shape for each kernel that the rules give for a grid of shapes; the split is a constant of w4a16_gemm."""
    for capability, processors in PROCESSORS.items():
        seen = set()
        for M, (N, K) in product((1, 16, 17, 64, 65, 4096), LLAMA):
            launch = w4a16.rule(M, N, K, torch.bfloat16, processors)
            key = (launch.block_m, launch.block_n, launch.warps, launch.stages, launch.scale_sums, launch.split)
            if key not in seen:
                seen.add(key)
                yield "w4a16_gemm", (M, N, K), launch, capability
        for N, C in product((999, 16384), (1024, 4096, 14336)):
            launch = hessian.rule(N, C, processors, capability >= 90, wide=capability == 90)
            key = (launch.block_j, launch.descriptors, launch.pieces == 1)
            if key not in seen:
                seen.add(key)
                yield "hessian", (N, C), launch, capability


@pytest.mark.parametrize(("op", "shape", "launch", "capability"), [*shipped(), *ruled()], ids=str)
def test_compiles_within_the_limits(op, shape, launch, capability, tmp_path):
    assert SUBJECTS[op].fault(shape, launch, capability, tmp_path) is None


def test_a_product_without_its_wait_is_a_hazard(tmp_path):
    """The check finds something: the same machine code, but for its waits."""
    launch = w4a16.rule(16, 4096, 4096, torch.bfloat16, 132)
    code = machine_code(SUBJECTS["w4a16_gemm"].build((16, 4096, 4096), launch, 90), tmp_path)
    assert hazards(code).products == 8
    assert hazards(code).writes == []
    assert len(hazards(re.sub(r"WARPGROUP\.DEPBAR", "NOP", code)).writes) >= 8


def test_names_of_gpus_are_known():
    assert capability_of("NVIDIA H100 80GB HBM3") == 90
    with pytest.raises(AssertionError, match="which compute capability 'V100' has"):
        capability_of("V100")
