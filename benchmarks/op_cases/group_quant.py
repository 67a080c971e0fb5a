"""Min-max quantization of a weight, packed in the same pass."""

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.group_quant import group_quant, reference
from lightning_compress.ops.pack import reference as pack_reference

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(N: int, K: int, group: int, bits: int, symmetric: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            W = torch.randn(N, K, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)

            def steps() -> tuple[Tensor, ...]:
                scale, zero = reference.qparams(W, group, bits, symmetric)
                codes = reference.codes(W, scale, zero, bits).to(torch.int8)
                return (pack_reference.pack(codes, bits), scale, *([] if zero is None else [zero]))

            def ours() -> tuple[Tensor, ...]:
                return tuple(t for t in group_quant(W, group, bits, symmetric) if t is not None)

            return Trial(ours, {"torch, step by step": steps}, steps)

        moved = 2 * N * K + 4 * N * -(-K * bits // 32) + N * K // group * (2 if symmetric else 3)
        shape = f"{N} x {K}, groups of {group}, {bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
        return Case("group_quant", shape, moved, 0, 1e-9, make)

    kinds = [(32 if tiny else 128, 4, True), (32 if tiny else 128, 4, False), (0, 8, True)]
    return [case(N, K, group or K, bits, symmetric) for group, bits, symmetric in kinds for N, K in shapes]
