"""int4 weights times tokens quantized to 8 bits, at the linear layers of Llama-8B and -70B."""

import torch
from torch import Tensor

from benchmarks.op_case import LLAMA, Case, Trial
from lightning_compress.ops.w4a8_gemm import reference, to_planes, w4a8_gemm
from lightning_compress.ops.w8a8_gemm import reference as w8a8_reference

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(65, 192)] if tiny else LLAMA
    tokens = (3, 17) if tiny else (1, 16, 64, 256, 1024)
    group = 64 if tiny else 128

    def case(M: int, N: int, K: int, kind: torch.dtype, group: int = group) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            codes = torch.randint(-8, 8, (N, K), generator=random, device=device).to(torch.int8)
            scale = (torch.rand(N, K // group, generator=random, device=device) * 0.01 + 0.001).to(dtype)
            planes, scale_GN = to_planes(codes, K, K // group), scale.t().contiguous()
            W = reference.dequantize(codes, scale, K, dtype)

            def exact() -> Tensor:
                return reference.gemm(*w8a8_reference.quantize_tokens(x, kind), codes, scale)

            contestants = {"matmul of dense weights": lambda: x @ W.t()}
            return Trial(lambda: w4a8_gemm(x, planes, scale_GN, kind), contestants, exact)

        moved = N * K // 2 + 2 * N * K // group + 2 * M * (N + K)
        scales = ", one scale per row" if group == K else ""
        shape = f"{N} x {K}, M = {M}, {'int8' if kind == torch.int8 else 'e4m3'} tokens{scales}"
        sizes = {"M": M, "N": N, "K": K}
        return Case("w4a8_gemm", shape, moved, M * N * K, 1e-2, make, sizes=sizes)  # 8 bits multiply twice as fast

    kinds = torch.float8_e4m3fn, torch.int8
    groups = [case(M, N, K, kind) for M in tokens for kind in kinds for N, K in shapes]
    return groups + [case(tokens[-1], N, K, kind, K) for kind in kinds for N, K in shapes]
