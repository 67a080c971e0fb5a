"""The ops whose launches are tuned: for each its table, its shapes, how a launch is called, and how it is compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.op_cases import LLAMA, Case, Trial
from benchmarks.op_cases.w4a16_gemm import operands
from lightning_compress.ops.hessian import launch as hessian
from lightning_compress.ops.launches import LaunchTable
from lightning_compress.ops.w4a16_gemm import grid_rows, to_planes
from lightning_compress.ops.w4a16_gemm import launch as w4a16
from lightning_compress.ops.w4a16_gemm import reference as w4a16_reference

__all__ = ["SUBJECTS", "Subject"]

GROUP = 128  # columns of a scale, where an op has groups
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """One op.

    Args:
        table: Where its launches are kept.
        sizes: What the numbers of a shape are.
        usual: Shapes that are tuned when none is named.
        candidates: (shape, processors) -> launches, the rule's first.
        at: The shape as the table names it.
        case: (shape, launch of ``ours``, launches of others by name) -> what is checked and timed.
        build: (shape, launch, capability) -> the compiled kernel.
    """

    table: LaunchTable[Any]
    sizes: Sequence[str]
    usual: list[Shape]
    candidates: Callable[[Shape, int], Iterator[Any]]
    at: Callable[[Shape], dict[str, Any]]
    case: Callable[[Shape, Any, Mapping[str, Any]], Case]
    build: Callable[[Shape, Any, int], Any]

    def entry(self, shape: Shape, launch: Any) -> dict[str, Any]:
        return {"at": self.at(shape), "launch": asdict(launch)}

    def fault(self, shape: Shape, launch: Any, capability: int, folder: Path) -> str | None:
        """Why a launch does not compile within the limits of the GPU, or None; files go into ``folder``."""
        from tests.support.triton_compilation import SHARED, inspect_code

        try:
            code = inspect_code(self.build(shape, launch, capability), folder)
        except Exception as error:  # of many kinds: the compiler's, the assembler's
            return f"does not compile: {type(error).__name__}"
        if code["spills"] or code["stack"]:
            return f"spills: {code['spills']} times, stack {code['stack']} bytes"
        if code["shared"] > SHARED[capability]:
            return f"shared memory: {code['shared']} bytes of {SHARED[capability]}"
        if code["hazards"]:
            return f"hazards: {code['hazards']} writes to registers that a product still reads; use another Triton"
        return None


def w4a16_case(shape: Shape, ours: Any, others: Mapping[str, Any]) -> Case:
    M, N, K = shape

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
        from lightning_compress.ops.w4a16_gemm.kernel import gemm

        x, packed, scale = operands(M, N, K, GROUP, device, dtype, seed)
        planes, (scale_GN, zero) = to_planes(packed), grid_rows(scale, None)

        def call(launch: Any) -> Callable[[], Tensor]:
            return lambda: gemm(x, planes, scale_GN, zero, launch)

        exact = lambda: w4a16_reference.gemm(x, packed, scale)  # noqa: E731
        return Trial(call(ours), {name: call(launch) for name, launch in others.items()}, exact)

    moved = N * K // 2 + 2 * N * K // GROUP + 2 * M * (N + K)
    return Case("w4a16_gemm", f"{N} x {K}, M = {M}", moved, 2 * M * N * K, 1e-2, make)


def build_w4a16(shape: Shape, launch: Any, capability: int) -> Any:
    from lightning_compress.ops.w4a16_gemm.kernel import constants, w4a16_kernel
    from tests.support.triton_compilation import compiled

    _, _, K = shape
    missing = ["zero_ptr"] + (["parts_ptr", "counter_ptr"] if launch.split == 1 else [])
    fixed = constants(launch, K // GROUP, K, torch.bfloat16, False) | dict.fromkeys(missing)
    types = {
        "x_ptr": "*bf16", "planes_ptr": "*i16", "scale_ptr": "*bf16", "out_ptr": "*bf16", "parts_ptr": "*fp32",
        "counter_ptr": "*i32",
    }  # fmt: skip
    return compiled(w4a16_kernel, capability, types, fixed, launch.warps, launch.stages, odd=("M",))


def hessian_case(shape: Shape, ours: Any, others: Mapping[str, Any]) -> Case:
    N, C = shape

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
        from lightning_compress.ops.hessian.kernel import accumulate_

        X = torch.randn(N, C, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
        H = torch.zeros(C, C, device=device, dtype=torch.float64)  # as calibration adds

        def call(launch: Any) -> Callable[[], Tensor]:
            return lambda: accumulate_(H.zero_(), X, launch)  # all launches pay for the zeros, and sums stay small

        exact = lambda: X.double().t() @ X.double()  # noqa: E731
        return Trial(call(ours), {name: call(launch) for name, launch in others.items()}, exact, torch.tril)

    return Case("hessian", f"N = {N}, C = {C}", 2 * N * C + 16 * C * C // 2, N * C * (C + 128), 1e-4, make)


def build_hessian(
    launch: Any,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    sums: torch.dtype = torch.float64,
    parts: bool = False,
) -> Any:
    from lightning_compress.ops.hessian.kernel import constants, hessian_kernel
    from tests.support.triton_compilation import POINTER, compiled

    i, j, n = launch.block_i, launch.block_j, launch.block_n
    x, h = POINTER[dtype], POINTER[sums]
    types = {"x_i": x, "x_j": x, "h": h, "pieces_ptr": "*fp32"}
    if launch.descriptors:
        types |= {"x_i": f"tensordesc<{x[1:]}[{n}, {i}]>", "x_j": f"tensordesc<{x[1:]}[{n}, {j}]>"}
    if reduces := launch.descriptors and sums == torch.float32:
        types["h"] = f"tensordesc<{h[1:]}[{i}, {j // 4}]>"
    fixed = constants(launch, reduces, parts) | {"stride_c": 1}
    odd = ("N", "uncut", "pieces")
    return compiled(hessian_kernel, capability, types, fixed, launch.warps, launch.stages, odd=odd)


SUBJECTS = {
    "w4a16_gemm": Subject(
        w4a16.TABLE, ("M", "N", "K"), [(M, N, K) for M in (1, 16, 64, 256) for N, K in LLAMA],
        lambda s, processors: w4a16.candidates(*s, torch.bfloat16, processors),
        lambda s: w4a16.shape(*s, torch.bfloat16, GROUP), w4a16_case, build_w4a16,
    ),
    "hessian": Subject(
        hessian.TABLE, ("N", "C"), [(16384, C) for C in (4096, 8192, 14336)],
        lambda s, processors: hessian.candidates(*s, processors, descriptors()),
        lambda s: hessian.shape(*s, torch.bfloat16, descriptors()), hessian_case,
        lambda _, launch, capability: build_hessian(launch, capability),
    ),
}  # fmt: skip


def descriptors() -> bool:
    """Whether the GPU at hand has tensor descriptors; so it is assumed where there is none."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
