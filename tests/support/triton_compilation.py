"""Compile a Triton kernel for a GPU that this machine lacks, and inspect its machine code."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.wgmma_hazards import hazards

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# of floats, integers, FP8; G: of a warp group; UTC: of sm_100
TENSOR_CORES = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA")
INSTRUCTIONS = (*TENSOR_CORES, "UTMALDG", "UTMAREDG")
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes that one block may have
POINTER = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.int16: "*i16",
    torch.int32: "*i32", torch.bool: "*i1", torch.float64: "*fp64",
}  # fmt: skip


def compiled(
    function: Any,
    capability: int,
    types: Mapping[str, str],
    fixed: Mapping[str, Any],
    warps: int,
    stages: int = 3,
    odd: tuple[str, ...] = (),
) -> Any:
    """The compiled kernel.

    Args:
        function: The ``triton.jit`` function.
        capability: 80, 89, 90 or 100.
        types: Types of arguments, as Triton writes them; arguments that are not named are int32.
        fixed: Values of the compile-time arguments.
        warps: Warps of a program.
        stages: Stages of the software pipeline.
        odd: Arguments that are not multiples of 16; all other pointers and integers are.
    """
    names = function.arg_names
    types = {name: types.get(name, "i32") for name in names}
    return triton.compile(
        ASTSource(
            fn=function,
            signature={name: "constexpr" if name in fixed else types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in fixed and name not in odd and types[name][0] in "*i"
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def inspect_code(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, stack, spills, shared memory, and the number of instructions of some kinds in the machine code."""
    code = machine_code(kernel, folder)
    resources = tool("cuobjdump", "-res-usage", str(folder / "kernel.cubin"))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    def resource(name: str) -> int:
        match = re.search(name + r":(\d+)", resources)
        assert match, resources
        return int(match[1])

    return {
        "registers": resource("REG"),
        "stack": resource("STACK"),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "shared": kernel.metadata.shared,
        "conversions": count(r"\bI2F"),
        "wide": count(r"\b(?:LDG|STG|LDGSTS)\.\S*128"),
        "instructions": count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"),
        "hazards": len(hazards(code).writes),
        **{name: count(rf"\b{name}\b") for name in INSTRUCTIONS},
    }


def loops(kernel: Any, folder: Path) -> list[list[str]]:
    """The instructions of each loop in the machine code, from the target of a backward branch to that branch."""
    labels: dict[str, int] = {}
    bodies, lines = [], []
    for line in machine_code(kernel, folder).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            lines.append(line.strip())
            back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if back and labels.get(back[1], len(lines)) < len(lines) - 1:  # a branch to itself ends a kernel
                bodies.append(lines[labels[back[1]] :])
    return bodies


def products_before_use(loop: list[str]) -> int | None:
    """Of the loads from memory to registers in a loop the smallest number of products that stand before the first use.

    None if the loop has no such loads. The loop may come to its beginning again before the use.
    """
    counts = []
    for n, line in enumerate(loop):
        if load := re.search(r"\bLDG\b.*? (R\d+),", line):
            after = loop[n + 1 :] + loop[:n]
            use = next((i for i, other in enumerate(after) if re.search(rf"\b{load[1]}\b", other)), len(after))
            counts.append(sum(bool(re.search(r"\b[HIQ]G?MMA\b", other)) for other in after[:use]))
    return min(counts, default=None)


def machine_code(kernel: Any, folder: Path) -> str:
    """What nvdisasm prints; the file ``kernel.cubin`` stays in the folder."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return tool("nvdisasm", "-c", str(cubin))


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
