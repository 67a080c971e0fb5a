"""W4A16: int4 weights times bf16 tokens, at the linear layers of Llama-8B and -70B."""

import torch
from torch import Tensor

from benchmarks.contestants import int4_products
from benchmarks.op_case import LLAMA, Case, Trial
from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, reference, to_planes, w4a16_gemm

__all__ = ["cases", "operands"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(65, 192)] if tiny else LLAMA
    tokens = (3, 17) if tiny else (1, 16, 64, 256, 8, 4, 2, 1024, 4096, 512, 2048, 32, 128, 17)
    group = 64 if tiny else 128

    def case(M: int, N: int, K: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            x, packed, scale = operands(M, N, K, group, device, dtype, seed)
            planes, (scale_GN, zero) = to_planes(packed), grid_rows(scale, None)
            W = dequantize(packed, scale, None, K, dtype)
            contestants = {"matmul of dense weights": lambda: x @ W.t()}
            if device.type == "cuda" and dtype == torch.bfloat16:
                contestants |= int4_products(x, packed, scale, group)
            return Trial(
                lambda: w4a16_gemm(x, planes, scale_GN, zero), contestants,
                lambda: reference.gemm(x, packed, scale),
            )  # fmt: skip

        moved = N * K // 2 + 2 * N * K // group + 2 * M * (N + K)
        sizes = {"M": M, "N": N, "K": K}
        return Case("w4a16_gemm", f"{N} x {K}, M = {M}", moved, 2 * M * N * K, 1e-2, make, sizes=sizes)

    return [case(M, N, K) for M in tokens for N, K in shapes]


def operands(
    M: int, N: int, K: int, group: int, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], packed codes int32 [N, K / 8] and scales [N, K / group]."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(M, K, generator=random, device=device).to(dtype)
    packed = torch.randint(-(2**31), 2**31, (N, K // 8), generator=random, device=device).int()
    return x, packed, (torch.rand(N, K // group, generator=random, device=device) * 0.01 + 0.001).to(dtype)
