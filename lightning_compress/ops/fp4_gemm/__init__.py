"""y = x W^T with FP4 weights (NVFP4, MXFP4): bf16, fp16 or float32 tokens times E2M1 codes, scaled group by group.

On CUDA the Triton kernel in kernel.py runs, for many tokens and gradients one that dequantizes the weight for cuBLAS;
elsewhere, and where it cannot run, torch dequantizes the weight in each call.
Layout, roofline and measured numbers are in the README beside this file.

Shapes: M tokens, N output features, K input features, G groups of K / G columns, P = 32 ceil(K / 128) words.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.ops.availability import kernel_runs
from lightning_compress.ops.fp4_gemm.layout import Layout, dense, to_layout
from lightning_compress.ops.fp4_gemm.reference import dequantize
from lightning_compress.ops.registration import check_tokens, product_op, skips_dispatcher
from lightning_compress.ops.w4a16_gemm.layout import check_words

__all__ = ["Layout", "dequantize", "fp4_gemm", "prepare", "to_layout"]

DENSE_FROM = 512  # tokens from which the weight is dequantized for cuBLAS, as in w4a16_gemm


def fp4_gemm(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, divisor_N: Tensor) -> Tensor:
    """The product x W^T, [..., N], in the dtype of x; the gradient goes to x, so that adapters train on packed weights.

    Args:
        x: Tokens, [..., K], float16, bfloat16 or float32.
        planes_NP: Bits of the codes, int16, from :func:`to_layout`.
        scale_GN: Scales, uint8, from :func:`to_layout`.
        divisor_N: Divisors of the scales, float32, from :func:`to_layout`.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    layout = Layout(planes_NP, scale_GN, divisor_N)
    check(x, layout)
    y: Tensor = _forward(x, *layout) if skips_dispatcher(x) else _gemm_op(x, *layout)
    return y


def prepare(x: Tensor, layout: Layout) -> Callable[[Tensor], Tensor] | None:
    """:func:`fp4_gemm` of contiguous x of the same ``call_key``, without checks; None if no kernel computes it."""
    check(x, layout)
    if not x.numel() or not _takes(x, layout.scale):
        return None
    from lightning_compress.ops.fp4_gemm import kernel

    return kernel.prepare(x, layout)


def check(x: Tensor, layout: Layout) -> None:
    """ValueError where the arguments of :func:`fp4_gemm` do not fit."""
    check_tokens(x, layout)
    kinds = tuple(t.dtype for t in layout)
    if kinds != (torch.int16, torch.uint8, torch.float32):
        raise ValueError(
            f"expected int16 planes, uint8 scales and float32 divisors, got {', '.join(map(str, kinds))}; make them "
            f"with to_layout"
        )
    planes_NP, scale_GN, divisor_N = layout
    N = planes_NP.shape[0] if planes_NP.ndim == 2 else -1
    if not x.ndim or scale_GN.ndim != 2 or scale_GN.shape[1] != N or divisor_N.shape != (N,):
        raise ValueError(
            f"expected x [..., K], planes [N, P], scale [G, N] and divisor [N], got {tuple(x.shape)}, "
            f"{', '.join(str(tuple(t.shape)) for t in layout)}"
        )
    K, G = x.shape[-1], scale_GN.shape[0]
    if not G or K % G or not K:
        raise ValueError(f"{G} groups do not divide K={K} columns; pass the x of this layer")
    check_words(K, planes_NP)
    if not all(t.is_contiguous() for t in layout):
        raise ValueError("planes, scale and divisor must be contiguous; call .contiguous() once, after loading")


def _forward(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, divisor_N: Tensor) -> Tensor:
    layout, K, N = Layout(planes_NP, scale_GN, divisor_N), x.shape[-1], len(divisor_N)
    x_MK = x.reshape(-1, K)
    if _takes(x, scale_GN):
        from lightning_compress.ops.fp4_gemm.kernel import gemm

        return gemm(x_MK, layout).view(*x.shape[:-1], N)
    return x @ _dense(*layout, K, x.dtype).t()


def _takes(x: Tensor, scale_GN: Tensor) -> bool:
    K = x.shape[-1]
    return x.is_cuda and x.numel() < DENSE_FROM * K and _kernel_runs(x, K // len(scale_GN))


def _kernel_runs(x: Tensor, group: int) -> bool:
    unfit = f"the group size {group} is not a multiple of 16" if group % 16 else None
    return kernel_runs(x.device, "FP4 weights are dequantized for every call", unfit, chained=True)


def _dense(planes_NP: Tensor, scale_GN: Tensor, divisor_N: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype``, the same bits on all devices."""
    layout = Layout(planes_NP, scale_GN, divisor_N)
    if planes_NP.is_cuda and kernel_runs(planes_NP.device, None):  # the product itself warns
        from lightning_compress.ops.fp4_gemm.kernel import dense as fused

        return fused(layout, K, dtype)
    return dense(layout, K, dtype)


_gemm_op = product_op("fp4_gemm", "Tensor planes, Tensor scale, Tensor divisor", _forward, _dense)
