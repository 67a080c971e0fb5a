"""W8A8: int8 codes of tokens and weights, the tokens quantized in the time."""

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.w8a8_gemm import quantize_tokens, reference, w8a8_gemm

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
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
                return reference.gemm(*reference.quantize_tokens(x), weight, scale_N)

            contestants = {"matmul of dense weights": lambda: x @ W.t()} | ({"torch int8": theirs} if M > 16 else {})
            return Trial(lambda: w8a8_gemm(*quantize_tokens(x), weight, scale_N, dtype), contestants, exact)

        shape = f"{N} x {K}, M = {M}, tokens quantized in the time"
        return Case("w8a8_gemm", shape, N * K + 2 * M * (N + K), 2 * M * N * K, 1e-2, make)

    return [case(M, N, K) for M in tokens for N, K in shapes]
