"""W8A8: int8 and FP8 codes, beside cuBLASLt in int8 and FP8; with and without quantizing the tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.w8a8_gemm import quantize_tokens, reference, w8a8_gemm, w8a8_linear

__all__ = ["cases", "kind_name"]

FP8 = torch.float8_e4m3fn
LARGEST = 448.0                                                # of e4m3


def kind_name(kind: torch.dtype) -> str:
    """As it stands in a shape."""
    return "int8" if kind == torch.int8 else "e4m3"


def cases(tiny: bool) -> list[Case]:
    shapes = [(48, 192)] if tiny else [(4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336)]
    tokens = (3, 17) if tiny else (1, 16, 64, 32, 256, 1024, 4096)

    def case(M: int, N: int, K: int, kind: torch.dtype, quantized: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            x = torch.randn(M, K, generator=random, device=device).to(dtype)
            weight = torch.randint(-128, 128, (N, K), generator=random, device=device).to(torch.int8)
            weight = weight if kind == torch.int8 else (weight.float() / 16).to(kind)
            scale_N = torch.rand(N, generator=random, device=device) * 1e-3 + 1e-4
            W, given = (weight.float() * scale_N[:, None]).to(dtype), quantize_tokens(x, kind)

            def theirs() -> Tensor:
                codes, scale = (quickly if device.type == "cuda" else int8_tokens)(x) if quantized else given
                return (torch._int_mm(codes, weight.t()) * scale_N * scale[:, None]).to(dtype)

            contestants: dict[str, Callable[[], Tensor]] = {"matmul of dense weights": lambda: x @ W.t()}
            if M > 16 and kind == torch.int8:                  # fewer are refused
                contestants["torch int8"] = theirs
            if device.type == "cuda":
                contestants["torch _scaled_mm"] = scaled_mm(x, W, quantized)

            def ours() -> Tensor:
                return w8a8_linear(x, weight, scale_N) if quantized else w8a8_gemm(*given, weight, scale_N, dtype)

            return Trial(
                ours, contestants, lambda: reference.gemm(*reference.quantize_tokens(x, kind), weight, scale_N)
            )

        what = "tokens quantized in the time" if quantized else "codes given"
        shape = f"{N} x {K}, M = {M}, {kind_name(kind)}, {what}"
        moved = N * K + (2 if quantized else 1) * M * K + 2 * M * N
        sizes = {"M": M, "N": N, "K": K, "quantized": int(quantized)}
        return Case("w8a8_gemm", shape, moved, M * N * K, 1e-2, make, sizes=sizes)    # 8 bits multiply twice as fast

    return [
        case(M, N, K, kind, quantized)
        for M in tokens for kind in (torch.int8, FP8) for N, K in shapes for quantized in (True, False)
    ]  # fmt: skip


def scaled_mm(x: Tensor, W: Tensor, quantized: bool) -> Callable[[], Tensor]:
    """torch's FP8 product with a scale for each token and each output feature."""
    weight, scale_N = fp8_rows(W)
    given = fp8_rows(x)

    def call() -> Tensor:
        codes, scale = quickly_fp8(x) if quantized else given
        result: Tensor = torch._scaled_mm(codes, weight.t(), scale, scale_N.t(), out_dtype=x.dtype, use_fast_accum=True)
        return result

    return call


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [rows, K] and scales [rows, 1]."""
    scale = x.float().abs().amax(1, keepdim=True) / LARGEST
    return (x.float() / scale).to(FP8), scale


def int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes in torch: codes int8 [M, K] and scales [M]."""
    scale = x.float().abs().amax(1) / reference.HALF_RANGE
    return (x.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8), scale


quickly = torch.compile(int8_tokens, dynamic=True)             # for all shapes at once: each takes seconds to compile
quickly_fp8 = torch.compile(fp8_rows, dynamic=True)
