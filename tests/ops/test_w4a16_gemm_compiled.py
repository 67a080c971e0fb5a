"""The kernel compiled for GPUs that are not there: no spills, tensor cores, shared memory within the limit, an
instruction budget. Needs the extra ``kernels`` (make test-kernels)."""

import os
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from lightning_compress.ops.w4a16_gemm.launch import Launch, rule

triton = pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; TRITON_INTERPRET=1 is for the interpreter's tests", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lightning_compress.ops.w4a16_gemm.kernel import constants, w4a16_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 166912, 89: 101376, 90: 232448}      # bytes that one block may have
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@pytest.fixture(autouse=True)
def numerics(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")          # Triton 3.9 warns where it is not chosen
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def compiled(capability: int, launch: Launch, groups: int, K: int, dtype, asymmetric: bool):
    """The kernel for one shape and GPU, and its machine code."""
    fixed = constants(launch, groups, K, dtype, asymmetric) | ({} if asymmetric else {"zero_ptr": None})
    out = dtype if launch.split == 1 else torch.float32
    types = {
        "x_ptr": POINTER[dtype], "planes_ptr": "*i16", "scale_ptr": POINTER[dtype], "zero_ptr": "*i8",
        "out_ptr": POINTER[out],
    }  # fmt: skip
    names = w4a16_kernel.arg_names
    kernel = triton.compile(
        ASTSource(
            fn=w4a16_kernel,
            signature={name: "constexpr" if name in fixed else types.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in fixed and name not in ("M", "blocks_per_split")
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    return kernel


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def facts(kernel, folder: Path) -> dict:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    resources, code = tool("cuobjdump", "-res-usage", str(cubin)), tool("nvdisasm", "-c", str(cubin))
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    return {
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "shared": kernel.metadata.shared,
        "HMMA": count(r"\bHMMA\b"),
        "HGMMA": count(r"\bHGMMA\b"),
        "conversions": count(r"\bI2F"),
        "instructions": count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"),
    }


CASES = {      # M, groups of K=4096, dtype, asymmetric; instructions: the most that Triton 3.9.0 made, and 5 %
    "few": (16, 32, torch.bfloat16, False, 520),
    "few-fp16-asymmetric": (16, 32, torch.float16, True, 530),
    "32-columns": (32, 128, torch.bfloat16, True, 790),
    "channel": (1, 1, torch.bfloat16, False, 510),
    "64": (64, 32, torch.bfloat16, False, 780),
    "many": (512, 32, torch.bfloat16, False, 1100),
    "many-asymmetric-64-columns": (512, 64, torch.bfloat16, True, 1460),
    "float32": (64, 32, torch.float32, False, 2130),
}


@pytest.mark.parametrize(("case", "capability"), [*product(CASES, (80, 90)), ("many", 89)], ids=str)
def test_compiles_without_spills_and_with_tensor_cores(case, capability, tmp_path):
    M, groups, dtype, asymmetric, budget = CASES[case]
    launch = rule(M, 4096, 4096, dtype, processors=132)
    found = facts(compiled(capability, launch, groups, 4096, dtype, asymmetric), tmp_path)
    assert (found["spills"], found["stack"]) == (0, 0), found
    assert found["shared"] <= SHARED[capability], found
    assert found["HGMMA" if capability == 90 else "HMMA"], found       # 64 features of a tile are the rows of wgmma
    assert dtype == torch.float32 or found["conversions"] <= 8, found  # of zero points; codes need none
    assert found["instructions"] <= budget, found
