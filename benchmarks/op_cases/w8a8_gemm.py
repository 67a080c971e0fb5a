"""W8A8: codes of 8 bits, beside cuBLASLt in int8 and FP8; with and without quantizing the tokens in the time."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.w8a8_gemm import quantize_tokens, reference, w8a8_gemm, w8a8_linear

__all__ = ["cases"]

FP8 = torch.float8_e4m3fn


def cases(tiny: bool) -> list[Case]:
    shapes = [(48, 192)] if tiny else [(8192, 8192), (4096, 4096), (28672, 4096), (4096, 14336)]
    tokens = (3, 17) if tiny else (1, 16, 64, 256, 1024)

    def case(M: int, N: int, K: int, kind: torch.dtype, quantized: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            weight = torch.randint(-128, 128, (N, K), generator=random, device=device).to(torch.int8)
            weight = weight if kind == torch.int8 else (weight.float() / 16).to(kind)
            scale_N = torch.rand(N, generator=random, device=device) * 1e-3 + 1e-4
            W, given = (weight.float() * scale_N[:, None]).to(dtype), quantize_tokens(x, kind)
            quantize = compiled if device.type == "cuda" else reference.quantize_tokens

            def int8() -> Tensor:
                codes, scale = quantize(x, torch.int8) if quantized else given
                return (torch._int_mm(codes, weight.t()) * scale_N * scale[:, None]).to(dtype)

            contestants: dict[str, Callable[[], Tensor]] = {"matmul of dense weights": lambda: x @ W.t()}
            if kind == torch.int8 and M > 16:  # fewer are refused
                contestants["torch int8"] = int8
            if device.type == "cuda" or (kind == FP8 and scales_rows_on_cpu()):
                contestants["torch _scaled_mm"] = scaled_mm(x, W, quantize if quantized else None)
            return Trial(
                lambda: w8a8_linear(x, weight, scale_N) if quantized else w8a8_gemm(*given, weight, scale_N, dtype),
                contestants, lambda: reference.gemm(*reference.quantize_tokens(x, kind), weight, scale_N),
            )  # fmt: skip

        name = "int8" if kind == torch.int8 else "e4m3"
        shape = f"{N} x {K}, M = {M}, {name}, {'tokens quantized in the time' if quantized else 'codes given'}"
        moved = N * K + (2 if quantized else 1) * M * K + 2 * M * N
        sizes = {"M": M, "N": N, "K": K, "quantized": int(quantized)}
        return Case("w8a8_gemm", shape, moved, M * N * K, 1e-2, make, sizes=sizes)  # 8 bits multiply twice as fast

    kinds = [(kind, quantized) for kind in (FP8, torch.int8) for quantized in (True, False)]
    return [case(M, N, K, *both) for M in tokens for N, K in shapes for both in kinds]


def scaled_mm(x: Tensor, W: Tensor, quantize: Callable[..., tuple[Tensor, Tensor]] | None) -> Callable[[], Tensor]:
    """torch's FP8 product with a scale for each token and each output feature; ``quantize``: tokens, in the time."""
    (weight, scale_N), given = reference.quantize_tokens(W, FP8), reference.quantize_tokens(x, FP8)

    def call() -> Tensor:
        codes, scale = given if quantize is None else quantize(x, FP8)
        result: Tensor = torch._scaled_mm(codes, weight.t(), scale[:, None], scale_N[None], out_dtype=x.dtype)
        return result

    return call


compiled = torch.compile(reference.quantize_tokens, dynamic=True)  # for all shapes: each takes seconds to compile


def scales_rows_on_cpu() -> bool:
    """Whether torch's FP8 product has a scale for each row on a CPU, which torch 2.10 refuses."""
    codes, one = torch.zeros(16, 16).to(FP8), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), one, one.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
