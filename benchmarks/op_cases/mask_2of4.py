"""Masks of which two in four stay."""

import torch

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.mask_2of4 import mask_2of4, reference

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(R: int, C: int, kind: torch.dtype) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            score = torch.randn(R, C, generator=torch.Generator(device).manual_seed(seed), device=device).to(kind)
            sorting = {"sort and scatter": lambda: reference.mask_2of4(score)}
            return Trial(lambda: mask_2of4(score), sorting, lambda: reference.mask_2of4(score.double()))

        return Case("mask_2of4", f"{R} x {C}, {kind}", R * C * (kind.itemsize + 1), 0, 1e-6, make, kind)

    return [case(R, C, kind) for kind in (torch.bfloat16, torch.float32) for R, C in shapes]
