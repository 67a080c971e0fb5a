"""NVFP4 and MXFP4 weights times bf16 tokens, at the linear layers of Llama-8B and -70B."""

import torch

from benchmarks.op_case import LLAMA, Case, Trial
from lightning_compress.ops.fp4_gemm import dequantize, fp4_gemm, reference, to_layout

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(65, 192)] if tiny else LLAMA
    tokens = (3, 17) if tiny else (1, 16, 64, 256, 4, 1024)

    def case(M: int, N: int, K: int, group: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            packed = torch.randint(0, 256, (N, K // 2), generator=random, device=device).to(torch.uint8)
            bits = torch.randint(80, 127, (N, K // group), generator=random, device=device).to(torch.uint8)
            scale, one = (bits, None) if group == 32 else (bits.view(torch.float8_e4m3fn), x.new_ones(1).float())
            layout, W = to_layout(packed, scale, one), dequantize(packed, scale, one, dtype)
            return Trial(
                lambda: fp4_gemm(x, *layout), {"matmul of dense weights": lambda: x @ W.t()},
                lambda: reference.gemm(x, packed, scale, one),
            )  # fmt: skip

        moved = N * K // 2 + N * K // group + 2 * M * (N + K)
        shape = f"{N} x {K}, M = {M}, {'NVFP4' if group == 16 else 'MXFP4'}"
        return Case("fp4_gemm", shape, moved, 2 * M * N * K, 1e-2, make, sizes={"M": M, "N": N, "K": K})

    return [case(M, N, K, group) for M in tokens for group in (16, 32) for N, K in shapes]
