"""What bench_ops.py measures: for each op its shapes, what it costs at least, itself, and torch's ways to its result.

A case is made anew from a seed, as often as buffers are rotated. What contestants need beforehand (packing, dense
weights) is made before the calls that are timed, at the first call at the latest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lightning_compress.ops.fake_quant import learned_step, straight_through
from lightning_compress.ops.gptq_block import Grid, cpu, gptq_block_
from lightning_compress.ops.gptq_block import reference as gptq_reference
from lightning_compress.ops.hadamard import hadamard_transform
from lightning_compress.ops.hadamard import reference as hadamard_reference
from lightning_compress.ops.hessian import hessian_accumulate_
from lightning_compress.ops.mask_2of4 import mask_2of4
from lightning_compress.ops.mask_2of4 import reference as mask_reference
from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, to_planes, w4a16_gemm
from lightning_compress.ops.w4a16_gemm import reference as w4a16_reference
from lightning_compress.ops.w8a8_gemm import quantize_tokens, w8a8_gemm
from lightning_compress.ops.w8a8_gemm import reference as w8a8_reference

__all__ = ["Case", "Trial", "cases"]

LLAMA = ((4096, 4096), (8192, 8192), (6144, 4096), (28672, 4096), (4096, 14336), (28672, 8192))    # N, K


Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass
class Trial:
    """One set of buffers. All calls compute the same; ``exact`` in float64, from the same numbers.

    Args:
        ours: The op.
        contestants: By name.
        exact: Slow, and needs memory.
        part: What of each result counts, of which the norm is taken.
    """

    ours: Call
    contestants: dict[str, Call]
    exact: Call
    part: Callable[[Tensor], Tensor] = torch.flatten


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: Folder under ops/.
        shape: As in the table.
        moved: Bytes that memory moves at least.
        flop: Of the cheapest way to the result.
        tolerance: Of the relative error (Frobenius norm) against ``Trial.exact``.
        make: (device, dtype, seed) -> Trial.
        dtype: Of the inputs.
    """

    op: str
    shape: str
    moved: int
    flop: int
    tolerance: float
    make: Callable[[torch.device, torch.dtype, int], Trial] = field(repr=False)
    dtype: torch.dtype = torch.bfloat16


def cases(ops: Sequence[str] = (), *, tiny: bool = False) -> list[Case]:
    """All cases, those that decide first; ``tiny`` ones run on a CPU in a second.

    Args:
        ops: Only these; empty: all.
        tiny: Shapes for the check of correctness.

    Raises:
        ValueError: There is no case of such an op.
    """
    makers = {
        "w4a16_gemm": w4a16_cases, "hessian": hessian_cases, "gptq_block": gptq_cases,
        "w8a8_gemm": w8a8_cases, "fake_quant": fake_quant_cases,
        "hadamard": hadamard_cases, "mask_2of4": mask_cases,
    }  # fmt: skip
    if unknown := [op for op in ops if op not in makers]:
        raise ValueError(f"no cases of {', '.join(unknown)}; expected some of {', '.join(makers)}")
    return [case for op, maker in makers.items() if not ops or op in ops for case in maker(tiny)]


def w4a16_cases(tiny: bool) -> list[Case]:
    shapes = [(65, 192)] if tiny else LLAMA
    tokens = (3, 17) if tiny else (1, 16, 64, 256, 2, 4, 8, 32, 128, 512, 1024, 2048, 4096, 17)
    group = 64 if tiny else 128

    def case(M: int, N: int, K: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            packed = torch.randint(-(2**31), 2**31, (N, K // 8), generator=random, device=device).int()
            scale = (torch.rand(N, K // group, generator=random, device=device) * 0.01 + 0.001).to(dtype)
            planes, (scale_GN, zero) = to_planes(packed), grid_rows(scale, None)
            W = dequantize(packed, scale, None, K, dtype)
            contestants = {"matmul of dense weights": lambda: x @ W.t()}
            if device.type == "cuda" and dtype == torch.bfloat16:
                contestants["torch int4pack"] = tinygemm(x, packed, scale, group)
            return Trial(
                lambda: w4a16_gemm(x, planes, scale_GN, zero), contestants,
                lambda: w4a16_reference.gemm(x, packed, scale),
            )  # fmt: skip

        moved = N * K // 2 + 2 * N * K // group + 2 * M * (N + K)
        return Case("w4a16_gemm", f"{N} x {K}, M = {M}", moved, 2 * M * N * K, 1e-2, make)

    return [case(M, N, K) for M in tokens for N, K in shapes]


def tinygemm(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> Callable[[], Tensor]:
    """torch's own int4 product; its packing takes two codes in a byte, the first in the high bits."""

    @cache
    def made() -> tuple[Tensor, Tensor]:
        codes = w4a16_reference.unpack(packed, x.shape[1]).to(torch.uint8)
        words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        return words, torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()

    return lambda: torch.ops.aten._weight_int4pack_mm(x, made()[0], group, made()[1])


def hessian_cases(tiny: bool) -> list[Case]:
    large = [(16384, 4096), (16384, 14336), (16384, 8192), (2048, 4096), (65536, 4096), (16384, 1024), (999, 1000)]
    shapes = [(70, 136)] if tiny else large

    def case(N: int, C: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            X = torch.randn(N, C, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
            sums = [torch.zeros(C, C, device=device) for _ in range(3)]
            contestants = {"float32": lambda: sums[1].addmm_(X.float().t(), X.float())}
            if device.type == "cuda":
                contestants = {
                    "mm with float32 result": lambda: sums[2].add_(torch.mm(X.t(), X, out_dtype=torch.float32))
                } | contestants
            exact = lambda: X.double().t() @ X.double()  # noqa: E731
            return Trial(lambda: hessian_accumulate_(sums[0], X), contestants, exact, torch.tril)

        return Case("hessian", f"N = {N}, C = {C}", 2 * N * C + 8 * C * C // 2, N * C * (C + 128), 1e-4, make)

    return [case(N, C) for N, C in shapes]


def gptq_cases(tiny: bool) -> list[Case]:
    """A block of int4 with bf16 scales; A is refilled within the time, since the op writes into it."""
    shapes = [(24, 7)] if tiny else [(128, R) for R in (4096, 1024, 6144, 28672)]

    def case(b: int, R: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(b, R, generator=random, device=device)
            U = (torch.randn(b, b, generator=random, device=device) * 0.2 / b**0.5).triu(1)
            scale = (torch.rand(1, R, generator=random, device=device) * 0.1 + 0.3).to(torch.bfloat16).float()
            group, grid = torch.zeros(b, dtype=torch.int32, device=device), Grid(-8, 7, 0, torch.bfloat16)

            def ours() -> tuple[Tensor, ...]:
                A, Q, D = W.clone(), torch.empty_like(W), torch.empty_like(W)
                gptq_block_(A, Q, D, W, U, grid, scale, None, group)
                return A, Q, D

            def loop() -> tuple[Tensor, ...]:
                A, Q, D = W.clone(), torch.empty_like(W), torch.empty_like(W)
                cpu.gptq_block_(A, Q, D, W, U, grid, scale, None, zeros, None, 0, b, 16)
                return A, Q, D

            zeros = torch.zeros(b, dtype=torch.int32)                # on the CPU: the loop reads it there
            exact = lambda: gptq_reference.gptq_block(W, W, U, grid, scale, None, group)  # noqa: E731
            return Trial(ours, {"torch, column by column": loop}, exact)

        # A code that lies in the middle may fall either way in float32, and takes others with it
        return Case("gptq_block", f"{b} columns, {R} rows", 28 * b * R, b * b * R, 2e-2, make, torch.float32)

    return [case(*shape) for shape in shapes]


def w8a8_cases(tiny: bool) -> list[Case]:
    shapes = [(65, 192)] if tiny else [(4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336)]
    tokens = (3, 17) if tiny else (1, 16, 64, 32, 256, 1024, 4096)

    def case(M: int, N: int, K: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            weight = torch.randint(-128, 128, (N, K), generator=random, device=device).to(torch.int8)
            scale_N = torch.rand(N, generator=random, device=device) * 1e-3 + 1e-4
            W = (weight.float() * scale_N[:, None]).to(dtype)

            def theirs() -> Tensor:
                scale = x.float().abs().amax(1, keepdim=True) / 127.5
                codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
                return (torch._int_mm(codes, weight.t()) * scale_N * scale).to(dtype)

            def exact() -> Tensor:
                return w8a8_reference.gemm(*w8a8_reference.quantize_tokens(x), weight, scale_N)

            contestants = {"matmul of dense weights": lambda: x @ W.t()} | ({"torch int8": theirs} if M > 16 else {})
            return Trial(lambda: w8a8_gemm(*quantize_tokens(x), weight, scale_N, dtype), contestants, exact)

        shape = f"{N} x {K}, M = {M}, tokens quantized in the time"
        return Case("w8a8_gemm", shape, N * K + 2 * M * (N + K), 2 * M * N * K, 1e-2, make)

    return [case(M, N, K) for M in tokens for N, K in shapes]


def hadamard_cases(tiny: bool) -> list[Case]:
    shapes = [(6, 1, 64), (5, 3, 16)] if tiny else [(16384, 1, 128), (8192, 1, 4096), (4096, 28, 512), (4096, 1, 16384)]

    def case(R: int, m: int, P: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(R, m * P, generator=random, device=device).to(dtype)
            signs = (torch.randint(0, 2, (m, m), generator=random, device=device) * 2 - 1).to(dtype)
            base, scale = None if m == 1 else signs, (m * P) ** -0.5
            H = (torch.kron(signs.double(), hadamard_reference.sylvester(P).to(device)) * scale).to(dtype)
            return Trial(
                lambda: hadamard_transform(x, base, scale), {"product with the dense matrix": lambda: x @ H},
                lambda: hadamard_reference.hadamard_transform(x, base, scale),
            )  # fmt: skip

        return Case("hadamard", f"{R} x {m} * {P}", 4 * R * m * P, 0, 1e-2, make)

    return [case(*shape) for shape in shapes]


def mask_cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(R: int, C: int, kind: torch.dtype) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            score = torch.randn(R, C, generator=torch.Generator(device).manual_seed(seed), device=device).to(kind)
            sorting = {"sort and scatter": lambda: mask_reference.mask_2of4(score)}
            return Trial(lambda: mask_2of4(score), sorting, lambda: mask_reference.mask_2of4(score.double()))

        return Case("mask_2of4", f"{R} x {C}, {kind}", R * C * (kind.itemsize + 1), 0, 1e-6, make, kind)

    return [case(R, C, kind) for kind in (torch.bfloat16, torch.float32) for R, C in shapes]


def fake_quant_cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(R: int, C: int, grain: str, learned: bool) -> Case:
        group = {"group": 32 if tiny else 128, "channel": C, "tensor": R * C}[grain]

        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(R, C, generator=random, device=device).to(dtype).requires_grad_()
            gradient = torch.randn(R, C, generator=random, device=device).to(dtype)
            size = (1,) if grain == "tensor" else (R, C // group)
            scale = (torch.rand(size, generator=random, device=device) * 0.05 + 0.2).to(dtype).requires_grad_(learned)
            function = learned_step if learned else straight_through
            wanted = (W, scale) if learned else (W,)

            def ours() -> tuple[Tensor, ...]:
                value = function(W, scale, None, -8, 7)
                return value.detach(), *torch.autograd.grad(value, wanted, gradient)

            def theirs() -> tuple[Tensor, ...]:
                value = (compiled_fake_quant if device.type == "cuda" else plain_fake_quant)(W, scale, group, learned)
                return value.detach(), *torch.autograd.grad(value, wanted, gradient)

            def exact() -> tuple[Tensor, ...]:
                s = scale.detach().double().reshape(-1, 1)
                v = W.detach().double().reshape(-1, group) / s
                g = gradient.double().reshape(v.shape)
                value = v.clamp(-8, 7).round() * s
                if not learned:
                    return value, g * ((v >= -8.5) & (v <= 7.5))
                inside = (v > -8) & (v < 7)
                slope = torch.where(inside, v.round() - v, v.clamp(-8, 7))
                of_scale = (slope * g).sum(-1) if grain != "tensor" else (slope * g).sum()
                return value, g * inside, of_scale / (group * 7) ** 0.5

            return Trial(ours, {"torch.compile" if device.type == "cuda" else "autograd": theirs}, exact)

        shape = f"{R} x {C}, {grain}, {'LSQ' if learned else 'STE'}, forward and backward"
        return Case("fake_quant", shape, 10 * R * C, 0, 0.02, make)

    return [case(R, C, grain, learned) for learned in (False, True) for grain in ("group", "channel", "tensor")
            for R, C in shapes]


def plain_fake_quant(W: Tensor, scale: Tensor, group: int, learned: bool) -> Tensor:
    """What one writes in torch for the same values and gradients; in float32, as the op."""
    lines, scales = W.reshape(-1, group).float(), scale.reshape(-1, 1).float()
    v = lines / scales
    if learned:
        slowed = scales / (group * 7) ** 0.5
        scales = slowed + (scales - slowed).detach()
        v = (lines / scales).clamp(-8, 7)
        return ((v + (v.round() - v).detach()) * scales).to(W.dtype).view(W.shape)
    value = v.clamp(-8, 7).round() * scales
    passed = torch.where((v >= -8.5) & (v <= 7.5), lines, lines.detach())
    return (passed + (value - passed).detach()).to(W.dtype).view(W.shape)


compiled_fake_quant = torch.compile(plain_fake_quant, dynamic=False)
