"""y = x W^T with int4 weights and tokens quantized to 8 bits by the op, FP8 (e4m3) or int8.

On CUDA the Triton kernels quantize tokens and multiply; elsewhere, and where they cannot run, torch computes with the
same codes. Layout, roofline and measured numbers are in the README beside this file.

Shapes: M tokens, N output features, K input features, G groups of K / G columns, P bytes in a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.ops.availability import kernel_runs
from lightning_compress.ops.registration import check_matrices, check_tokens, product_op, skips_dispatcher
from lightning_compress.ops.w4a8_gemm.layout import PLANES, codes, plane_of, to_planes
from lightning_compress.ops.w4a8_gemm.reference import dequantize
from lightning_compress.ops.w8a8_gemm import KINDS, quantize_tokens, w8a8_gemm

__all__ = ["dequantize", "prepare", "to_planes", "w4a8_gemm"]

# Tokens from which the weight is unpacked for cuBLAS, predicted (README). With one scale per row it becomes 8-bit
# codes, and the sums are those of the kernel; scales of groups are not factors of an 8-bit product of whole rows, so
# weight and tokens become 16-bit numbers, which the tensor cores multiply at half the rate.
DENSE_FROM = 512
E4M3_UNIT = 512.0  # codes as e4m3 are times 2^-9


def w4a8_gemm(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """The product, [..., N], in the dtype of x; the gradient of x is straight-through.

    Args:
        x: Tokens, [..., K], float16, bfloat16 or float32.
        planes_NP: Codes, int8, from :func:`to_planes`.
        scale_GN: Scales of a symmetric grid, any floating dtype: those of the checkpoint, transposed and contiguous.
        kind: Dtype of the codes of tokens, float8_e4m3fn (preset W4AFP8) or int8 (W4A8); see quantize_tokens of
            w8a8_gemm.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    check(x, planes_NP, scale_GN, kind)
    y: Tensor = (_forward if skips_dispatcher(x) else _gemm_op)(x, planes_NP, scale_GN, kind)
    return y


def prepare(
    x: Tensor, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype = torch.float8_e4m3fn
) -> Callable[[Tensor], Tensor] | None:
    """:func:`w4a8_gemm` of contiguous x of the same ``call_key``, without checks; None if no kernel computes it."""
    check(x, planes_NP, scale_GN, kind)
    if not x.numel() or not _takes(x, scale_GN):
        return None
    from lightning_compress.ops.w4a8_gemm import kernel

    return kernel.prepare(x, planes_NP, scale_GN, kind)


def check(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype) -> None:
    """ValueError where the arguments of :func:`w4a8_gemm` do not fit."""
    check_tokens(x, (planes_NP, scale_GN))
    if kind not in KINDS:
        raise ValueError(f"expected codes of int8 or float8_e4m3fn, got {kind}")
    if planes_NP.dtype != torch.int8 or not scale_GN.is_floating_point():
        raise ValueError(
            f"expected int8 planes and a floating scale, got {planes_NP.dtype} and {scale_GN.dtype}; make the planes "
            f"with to_planes"
        )
    check_matrices(x, planes_NP, scale_GN)
    K, G, P = x.shape[-1], scale_GN.shape[0], planes_NP.shape[1]
    if not G or not K or K % G:
        raise ValueError(f"{G} groups do not divide K={K} columns; pass a scale [G, N] with G a divisor of K")
    plane = plane_of(K, G)
    if -(-K // (PLANES * plane)) * plane != P:
        raise ValueError(
            f"x has K={K} columns, a row of the weight has {P} bytes of {PLANES} columns in planes of {plane}; pass "
            f"the x of this layer"
        )
    if not planes_NP.is_contiguous() or not scale_GN.is_contiguous():
        raise ValueError("planes and scale must be contiguous; call .contiguous() once, after loading")


def _forward(x: Tensor, planes_NP: Tensor, scale_GN: Tensor, kind: torch.dtype) -> Tensor:
    K, (G, N) = x.shape[-1], scale_GN.shape
    codes_MK, scale_M = quantize_tokens(x.reshape(-1, K), kind)
    if _takes(x, scale_GN):
        from lightning_compress.ops.w4a8_gemm.kernel import gemm

        y_MN = gemm(codes_MK, scale_M, planes_NP, scale_GN, x.dtype)
    elif x.is_cuda and G == 1 and kernel_runs(x.device, None):
        from lightning_compress.ops.w4a8_gemm.kernel import eight_bits

        scale_N = scale_GN[0].float() * (1 if kind == torch.int8 else E4M3_UNIT)
        y_MN = w8a8_gemm(codes_MK, scale_M, eight_bits(planes_NP, K, G, kind), scale_N, x.dtype)
    elif x.is_cuda and x.dtype != torch.float32:
        y_MN = codes_MK.to(x.dtype) * scale_M.to(x.dtype)[:, None] @ _dense(planes_NP, scale_GN, K, x.dtype).t()
    else:
        y_MN = (codes_MK.float() @ _dense(planes_NP, scale_GN, K, torch.float32).t() * scale_M[:, None]).to(x.dtype)
    return y_MN.view(*x.shape[:-1], N)


def _takes(x: Tensor, scale_GN: Tensor) -> bool:
    """Whether the fused kernel computes the product."""
    K, G = x.shape[-1], len(scale_GN)
    many = x.numel() >= DENSE_FROM * K and (G == 1 or x.dtype != torch.float32)
    return x.is_cuda and not many and _kernel_runs(x, K // G, G)


def _kernel_runs(x: Tensor, group: int, groups: int) -> bool:
    unfit = f"the group size {group} is not a multiple of 32" if groups > 1 and group % 32 else None
    return kernel_runs(x.device, "int4 weights are dequantized for every call", unfit, chained=True)


def _dense(planes_NP: Tensor, scale_GN: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype``, the same bits on all devices."""
    if planes_NP.is_cuda and kernel_runs(planes_NP.device, None):  # the product itself warns
        from lightning_compress.ops.w4a8_gemm.kernel import dense

        return dense(planes_NP, scale_GN, K, dtype)
    return dequantize(codes(planes_NP, K, scale_GN.shape[0]), scale_GN.t(), K, torch.float32).to(dtype)


_gemm_op = product_op("w4a8_gemm", "Tensor planes, Tensor scale", _forward, _dense, options="ScalarType kind")
