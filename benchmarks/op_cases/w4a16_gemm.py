"""W4A16: int4 weights times bf16 tokens, at the linear layers of Llama-8B and -70B."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.op_case import LLAMA, Case, Trial
from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, reference, to_planes, w4a16_gemm

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
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
                lambda: reference.gemm(x, packed, scale),
            )  # fmt: skip

        moved = N * K // 2 + 2 * N * K // group + 2 * M * (N + K)
        return Case("w4a16_gemm", f"{N} x {K}, M = {M}", moved, 2 * M * N * K, 1e-2, make)

    return [case(M, N, K) for M in tokens for N, K in shapes]


def tinygemm(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> Callable[[], Tensor]:
    """torch's own int4 product; its packing takes two codes in a byte, the first in the high bits."""

    @cache
    def made() -> tuple[Tensor, Tensor]:
        codes = reference.unpack(packed, x.shape[1]).to(torch.uint8)
        words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        return words, torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()

    return lambda: torch.ops.aten._weight_int4pack_mm(x, made()[0], group, made()[1])
