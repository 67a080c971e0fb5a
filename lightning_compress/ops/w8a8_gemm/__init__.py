"""y = (codes of x) (codes of W)^T, int8 times int8 added up in int32, scaled by token and by output feature.

On CUDA a Triton kernel makes products of few tokens, and torch's own int8 product those of many; elsewhere exact
float32 products of 1024 columns. README beside this file.

Shapes: M tokens, N output features, K input features.
"""

import torch
from torch import Tensor

from lightning_compress.ops.availability import kernel_runs
from lightning_compress.ops.w8a8_gemm import reference

__all__ = ["quantize_tokens", "w8a8_gemm"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 64                # tokens up to which the kernel is expected to win over cuBLASLt; not measured yet
EXACT = 1024            # products of -128 and -128 whose sum float32 holds: 2^24


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and scales float32 [...]: symmetric, the largest of a token is 127.5 steps.

    Args:
        x: float16, bfloat16 or float32, [..., K].

    Raises:
        ValueError: Another dtype, or no columns.
    """
    if x.dtype not in DTYPES or not x.ndim or not x.shape[-1]:
        raise ValueError(f"expected x [..., K] in float16, bfloat16 or float32, got {x.dtype} {tuple(x.shape)}")
    if x.is_cuda or torch.compiler.is_compiling():
        codes, scale = _quantize_op(x.detach())
        return codes, scale
    return _quantize(x)


def w8a8_gemm(codes: Tensor, scale: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The product [..., N] in ``dtype``; no gradients.

    Args:
        codes: int8 [..., K], from :func:`quantize_tokens`.
        scale: float32 [...].
        weight_NK: int8, contiguous.
        scale_N: float32 [N].
        dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: Dtypes, shapes or devices do not fit.
    """
    if (codes.dtype, weight_NK.dtype, scale.dtype, scale_N.dtype) != (torch.int8,) * 2 + (torch.float32,) * 2:
        raise ValueError(
            f"expected int8 codes and float32 scales, got {codes.dtype} and {weight_NK.dtype}, {scale.dtype} and "
            f"{scale_N.dtype}; make those of tokens with quantize_tokens"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    N = len(weight_NK) if weight_NK.ndim else 0
    shapes = (scale.shape, weight_NK.shape, scale_N.shape)
    if not codes.ndim or shapes != (codes.shape[:-1], (N, codes.shape[-1]), (N,)):
        raise ValueError(
            f"expected codes [..., K], their scale [...], weight [N, K] and its scale [N], got {tuple(codes.shape)}, "
            f"{tuple(scale.shape)}, {tuple(weight_NK.shape)} and {tuple(scale_N.shape)}"
        )
    if len({t.device for t in (codes, scale, weight_NK, scale_N)}) > 1:
        raise ValueError(f"codes are on {codes.device}, the weight is on {weight_NK.device}; put all on one device")
    if not weight_NK.is_contiguous():
        raise ValueError("the weight must be contiguous; call .contiguous() once, when loading")
    if torch.compiler.is_compiling():
        result: Tensor = _gemm_op(codes, scale, weight_NK, scale_N, dtype)
        return result
    return _gemm(codes, scale, weight_NK, scale_N, dtype)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    x_MK = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(x_MK) and _kernel_runs(x.device):
        from lightning_compress.ops.w8a8_gemm.kernel import quantize_tokens as quantize
    else:
        quantize = reference.quantize_tokens
    codes_MK, scale_M = quantize(x_MK)
    return codes_MK.view(x.shape), scale_M.view(x.shape[:-1])


def _gemm(codes: Tensor, scale: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    N, K = weight_NK.shape
    codes_MK, scale_M = codes.reshape(-1, K).contiguous(), scale.reshape(-1).contiguous()
    M = len(codes_MK)
    of_torch = codes.is_cuda and M > 16 and N % 8 == 0 and K % 8 == 0          # what cuBLASLt takes
    if codes.is_cuda and M and N and not (of_torch and M > FEW) and _kernel_runs(codes.device):
        from lightning_compress.ops.w8a8_gemm.kernel import gemm

        return gemm(codes_MK, scale_M, weight_NK, scale_N, dtype).view(*codes.shape[:-1], N)
    sums_MN = torch._int_mm(codes_MK, weight_NK.t()) if of_torch else _exact(codes_MK, weight_NK)
    return (sums_MN * scale_N * scale_M[:, None]).to(dtype).view(*codes.shape[:-1], N)


def _exact(codes_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """int32 [M, N] by float32 products; torch's own int8 product is slow on CPUs without VNNI."""
    sums_MN = torch.zeros(len(codes_MK), len(weight_NK), dtype=torch.int32, device=codes_MK.device)
    for x, w in zip(codes_MK.split(EXACT, 1), weight_NK.split(EXACT, 1), strict=True):
        sums_MN += (x.float() @ w.float().t()).int()
    return sums_MN


def _kernel_runs(device: torch.device) -> bool:
    return kernel_runs(device, "int8 products are made by torch")


@torch.library.custom_op("lightning_compress::quantize_tokens", mutates_args=())
def _quantize_op(x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize(x)


@_quantize_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lightning_compress::w8a8_gemm", mutates_args=())
def _gemm_op(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _gemm(codes, scale, weight, weight_scale, dtype)


@_gemm_op.register_fake
def _(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[0], dtype=dtype)
