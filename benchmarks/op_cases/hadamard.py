"""Rows times a Hadamard matrix."""

import torch

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.hadamard import hadamard_transform, reference

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 1, 64), (5, 3, 16)] if tiny else [(16384, 1, 128), (8192, 1, 4096), (4096, 28, 512), (4096, 1, 16384)]

    def case(R: int, m: int, P: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(R, m * P, generator=random, device=device).to(dtype)
            signs = (torch.randint(0, 2, (m, m), generator=random, device=device) * 2 - 1).to(dtype)
            base, scale = None if m == 1 else signs, (m * P) ** -0.5
            H = (torch.kron(signs.double(), reference.sylvester(P).to(device)) * scale).to(dtype)
            return Trial(
                lambda: hadamard_transform(x, base, scale), {"product with the dense matrix": lambda: x @ H},
                lambda: reference.hadamard_transform(x, base, scale),
            )  # fmt: skip

        return Case("hadamard", f"{R} x {m} * {P}", 4 * R * m * P, 0, 1e-2, make)

    return [case(*shape) for shape in shapes]
