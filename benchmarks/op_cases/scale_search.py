"""Scales of a weight by the search for the least weighted error."""

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.scale_search import reference, scale_search, scale_sweep

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(N: int, K: int, group: int, bits: int, symmetric: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(N, K, generator=random, device=device).to(dtype)
            h = torch.randn(K, generator=random, device=device).exp()

            def steps() -> Tensor:
                return reference.scale_search(W, h, group, bits, symmetric, False, 2.0)[0]

            def ours() -> Tensor:
                return scale_search(W, h, group, bits, symmetric)[0]

            return Trial(ours, {"torch, step by step": steps}, steps)

        shape = f"{N} x {K}, groups of {group}, {bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
        # choices between equal losses may differ: the scales of a few groups in a million
        return Case("scale_search", shape, 2 * N * K + 3 * N * K // group, 0, 1e-3, make)

    def storable(N: int, K: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(N, K, generator=random, device=device).to(dtype)
            h = torch.randn(K, generator=random, device=device).exp()
            most = W.float().unflatten(1, (-1, 16)).abs().amax(2) / 6
            global_scale = 448 / most.max().view(1)
            scale = (most * global_scale).to(torch.float8_e4m3fn).float() / global_scale

            def steps() -> Tensor:
                return reference.scale_sweep(W, scale, h, 4, global_scale, 2.0)

            return Trial(
                lambda: scale_sweep(W, scale, h, 4, global_scale), {"torch, step by step": steps}, steps
            )  # fmt: skip

        return Case("scale_search", f"{N} x {K}, scales of NVFP4", 2 * N * K + 8 * N * K // 16, 0, 1e-3, make)

    kinds = [(32 if tiny else 128, 4, True), (32 if tiny else 128, 4, False), (0, 8, True)]
    lines = [case(N, K, group or K, bits, symmetric) for group, bits, symmetric in kinds for N, K in shapes]
    return lines + [storable(N, K) for N, K in shapes]
