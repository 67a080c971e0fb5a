"""H += X^T X, at the widths of Llama-8B and -70B; H is float64, as calibration adds."""

import torch

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.hessian import hessian_accumulate_

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    large = [(16384, 4096), (16384, 14336), (16384, 8192), (2048, 4096), (65536, 4096), (16384, 1024), (999, 1000)]
    shapes = [(70, 136)] if tiny else large

    def case(N: int, C: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            X = torch.randn(N, C, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
            sums = [torch.zeros(C, C, device=device, dtype=torch.float64) for _ in range(3)]
            contestants = {"float32": lambda: sums[1].add_(X.float().t() @ X.float())}
            if device.type == "cuda":
                contestants = {
                    "mm with float32 result": lambda: sums[2].add_(torch.mm(X.t(), X, out_dtype=torch.float32))
                } | contestants
            exact = lambda: X.double().t() @ X.double()  # noqa: E731
            return Trial(lambda: hessian_accumulate_(sums[0], X), contestants, exact, torch.tril)

        moved, flop, sizes = 2 * N * C + 16 * C * C // 2, N * C * (C + 128), {"N": N, "C": C}
        return Case("hessian", f"N = {N}, C = {C}", moved, flop, 1e-4, make, sizes=sizes)

    return [case(N, C) for N, C in shapes] + [of_float32(N, C) for N, C in shapes[:2]]


def of_float32(N: int, C: int) -> Case:
    """float32 inputs, as three products of bf16."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
        X = torch.randn(N, C, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float32)
        sums = [torch.zeros(C, C, device=device, dtype=torch.float64) for _ in range(2)]
        contestants = {"product in float32": lambda: sums[1].add_(X.t() @ X)}
        exact = lambda: X.double().t() @ X.double()  # noqa: E731
        return Trial(lambda: hessian_accumulate_(sums[0], X), contestants, exact, torch.tril)

    # 2e-5: 3e-6 by arithmetic, and what tensor cores truncate, which is not known
    moved, flop, sizes = 4 * N * C + 16 * C * C // 2, 3 * N * C * (C + 128), {"N": N, "C": C}
    return Case("hessian", f"N = {N}, C = {C}, float32", moved, flop, 2e-5, make, sizes=sizes)
