"""y = x W^T with int4 weights: bf16, fp16 or float32 tokens times codes with a scale for each group.

On CUDA the Triton kernel in kernel.py runs, for many tokens and gradients one that dequantizes the weight for cuBLAS;
elsewhere, and where it cannot run, torch dequantizes the weight in each call.
Layout, roofline and measured numbers are in the README beside this file.

Shapes: M tokens, N output features, K input features, G groups of K / G columns, P = 32 ceil(K / 128) words.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.ops.availability import kernel_runs
from lightning_compress.ops.registration import check_matrices, check_tokens, product_op, skips_dispatcher
from lightning_compress.ops.w4a16_gemm.layout import (
    PLANE,
    check_words,
    from_grid_rows,
    from_planes,
    grid_rows,
    to_planes,
)
from lightning_compress.ops.w4a16_gemm.reference import SYMMETRIC_ZERO, dequantize, unpack

__all__ = ["dequantize", "from_grid_rows", "from_planes", "grid_rows", "prepare", "to_planes", "w4a16_gemm"]

# Tokens from which the weight is dequantized for cuBLAS, predicted: the kernel multiplies at half the rate of cuBLAS,
# which from about 300 tokens on, whatever N and K, costs more than writing and reading 2 bytes per weight.
DENSE_FROM = 512


def w4a16_gemm(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None = None) -> Tensor:
    """The product x W^T, [..., N], in the dtype of x; the gradient goes to x, so that adapters train on packed weights.

    Args:
        x: Tokens, [..., K], float16, bfloat16 or float32.
        planes_NP: Codes, int16, from :func:`to_planes`.
        scale_GN: Scales, any floating dtype, from :func:`grid_rows`.
        zero_GN: Zero points, int8, 0 to 15, from :func:`grid_rows`; None for a symmetric grid.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    check(x, planes_NP, scale_GN, zero_GN)
    y: Tensor = (_forward if skips_dispatcher(x) else _gemm_op)(x, planes_NP, scale_GN, zero_GN)
    return y


def prepare(
    x: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None = None
) -> Callable[[Tensor], Tensor] | None:
    """:func:`w4a16_gemm` of contiguous x of the same ``call_key``, without checks; None if no kernel computes it."""
    check(x, planes_NP, scale_GN, zero_GN)
    if not x.numel() or not _takes(x, scale_GN):
        return None
    from lightning_compress.ops.w4a16_gemm import kernel

    return kernel.prepare(x, planes_NP, scale_GN, zero_GN)


def check(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None) -> None:
    """ValueError where the arguments of :func:`w4a16_gemm` do not fit."""
    weights = [planes_NP, scale_GN, *([] if zero_GN is None else [zero_GN])]
    check_tokens(x, weights)
    if planes_NP.dtype != torch.int16 or not scale_GN.is_floating_point():
        raise ValueError(
            f"expected int16 planes and a floating scale, got {planes_NP.dtype} and {scale_GN.dtype}; make them with "
            f"to_planes and grid_rows"
        )
    if zero_GN is not None and (zero_GN.dtype != torch.int8 or zero_GN.shape != scale_GN.shape):
        raise ValueError(
            f"expected int8 zero points of the scale's shape {tuple(scale_GN.shape)}, got {zero_GN.dtype} "
            f"{tuple(zero_GN.shape)}; make them with grid_rows"
        )
    check_matrices(x, planes_NP, scale_GN)
    K, G = x.shape[-1], scale_GN.shape[0]
    check_words(K, planes_NP)
    if K % G:
        raise ValueError(f"{G} groups do not divide K={K} columns; pass a scale [G, N] with G a divisor of K")
    if not all(t.is_contiguous() for t in weights):
        raise ValueError("planes, scale and zero points must be contiguous; call .contiguous() once, after loading")


def _forward(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None) -> Tensor:
    K, N = x.shape[-1], planes_NP.shape[0]
    x_MK = x.reshape(-1, K)
    if _takes(x, scale_GN):
        from lightning_compress.ops.w4a16_gemm.kernel import gemm

        return gemm(x_MK, planes_NP, scale_GN, zero_GN).view(*x.shape[:-1], N)
    return x @ _dense(planes_NP, scale_GN, zero_GN, K, x.dtype).t()


def _takes(x: Tensor, scale_GN: Tensor) -> bool:
    G, K = len(scale_GN), x.shape[-1]
    return x.is_cuda and x.numel() < DENSE_FROM * K and _kernel_runs(x, K // G, G)


def _kernel_runs(x: Tensor, group: int, groups: int) -> bool:
    unfit = f"the group size {group} is not a multiple of {PLANE}" if groups > 1 and group % PLANE else None
    return kernel_runs(x.device, "int4 weights are dequantized for every call", unfit, chained=True)


def _dense(planes_NP: Tensor, scale_GN: Tensor, zero_GN: Tensor | None, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype``, the same bits on all devices."""
    if planes_NP.is_cuda and kernel_runs(planes_NP.device, None):  # the product itself warns
        from lightning_compress.ops.w4a16_gemm.kernel import dense

        return dense(planes_NP, scale_GN, zero_GN, K, dtype)
    G, N = scale_GN.shape
    codes_NGg = unpack(from_planes(planes_NP, K), K).view(N, G, K // G)
    zero_NG1 = SYMMETRIC_ZERO if zero_GN is None else zero_GN.t().unsqueeze(-1)
    return (codes_NGg - zero_NG1).float().mul_(scale_GN.t().unsqueeze(-1).float()).view(N, K).to(dtype)


_gemm_op = product_op("w4a16_gemm", "Tensor planes, Tensor scale, Tensor? zero", _forward, _dense)
