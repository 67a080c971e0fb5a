"""y = (codes of x) (codes of W)^T in 8 bits, int8 or FP8 (e4m3), with a scale per token and per output feature.

On CUDA a Triton kernel multiplies few tokens, and torch's 8-bit products multiply many; elsewhere products are in
float32, exact for int8. README beside this file.

Shapes: M tokens, N output features, K input features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.registration import product_op, register_op, skips_dispatcher
from lightning_compress.ops.w8a8_gemm import reference

__all__ = ["KINDS", "prepare", "quantize_static", "quantize_tokens", "w8a8_gemm", "w8a8_linear"]

KINDS = (torch.int8, torch.float8_e4m3fn)
FEW = 64  # tokens up to which the kernel is expected to win over cuBLASLt; not measured yet
EXACT = 1024  # number of products (-128) (-128) whose sum, 2^24, is exact in float32


def quantize_tokens(x: Tensor, kind: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes [..., K] and scales float32 [...], symmetric: the maximum of a token is 127.5 steps of int8, 448 of e4m3.

    Both are those of compressed-tensors' fake-quantize, with its roundings to the dtype of x.

    Args:
        x: Tokens, float16, bfloat16 or float32, [..., K].
        kind: Dtype of the codes, int8 or float8_e4m3fn.

    Raises:
        ValueError: Wrong dtype, or no columns.
    """
    _check_tokens(x, kind)
    codes, scale = (_quantize_op if torch.compiler.is_compiling() else _quantize)(x.detach(), kind)
    return codes, scale


def quantize_static(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Codes [..., K] of ``kind`` for one fixed scale [1]; the quotient has the dtype of x and scale together.

    Raises:
        ValueError: Wrong dtype, no columns, or more than one scale.
    """
    _check_tokens(x, kind)
    if scale.shape != (1,) or not scale.is_floating_point():
        raise ValueError(f"expected one floating scale [1], got {scale.dtype} {tuple(scale.shape)}")
    return _quantize_static(x.detach(), scale, kind)


def w8a8_gemm(codes: Tensor, scale: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The product [..., N] in ``dtype``; no gradients.

    Args:
        codes: Codes of tokens, int8 or float8_e4m3fn, [..., K], from :func:`quantize_tokens`.
        scale: Scales of tokens, float32 [...], or [1]: one for all tokens.
        weight_NK: Codes of the weight, in the dtype of ``codes``, contiguous.
        scale_N: Scales of the weight, float32 [N], or [1]: one for all features.
        dtype: Dtype of the product, float16, bfloat16 or float32.

    Raises:
        ValueError: Dtypes, shapes or devices do not fit.
    """
    if codes.dtype not in KINDS or weight_NK.dtype != codes.dtype or {scale.dtype, scale_N.dtype} != {torch.float32}:
        raise ValueError(
            f"expected int8 or float8_e4m3fn codes on both sides and float32 scales, got {codes.dtype} and "
            f"{weight_NK.dtype}, {scale.dtype} and {scale_N.dtype}; make those of tokens with quantize_tokens"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    N = len(weight_NK) if weight_NK.ndim else 0
    scaled = scale.shape in (codes.shape[:-1], (1,)) and scale_N.shape in ((N,), (1,))
    if not codes.ndim or not scaled or weight_NK.shape != (N, codes.shape[-1]):
        raise ValueError(
            f"expected codes [..., K], their scale [...] or [1], weight [N, K] and its scale [N] or [1], got "
            f"{tuple(codes.shape)}, {tuple(scale.shape)}, {tuple(weight_NK.shape)} and {tuple(scale_N.shape)}"
        )
    _check_place("codes are", (codes, scale), (weight_NK, scale_N))
    y: Tensor = (_gemm_op if torch.compiler.is_compiling() else _gemm)(codes, scale, weight_NK, scale_N, dtype)
    return y


def w8a8_linear(x: Tensor, weight_NK: Tensor, scale_N: Tensor, scale: Tensor | None = None) -> Tensor:
    """The product [..., N] of quantized x, in the dtype of x; the gradient of x is straight-through.

    Args:
        x: Tokens, float16, bfloat16 or float32, [..., K].
        weight_NK: Codes of the weight, int8 or float8_e4m3fn, contiguous; codes of x have the same dtype.
        scale_N: Scales of the weight, float32 [N], or [1]: one for all features.
        scale: Fixed floating scale [1] of x; None: each token gets its own scale.

    Raises:
        ValueError: Dtypes, shapes or devices do not fit.
    """
    _check_linear(x, weight_NK, scale_N, scale)
    y: Tensor = (_linear if skips_dispatcher(x) else _linear_op)(x, weight_NK, scale_N, scale)
    return y


def prepare(
    x: Tensor, weight_NK: Tensor, scale_N: Tensor, scale: Tensor | None = None
) -> Callable[[Tensor], Tensor] | None:
    """:func:`w8a8_linear` of contiguous x of the same ``call_key``, without checks; None if torch computes it."""
    _check_linear(x, weight_NK, scale_N, scale)
    M, N = x.numel() // x.shape[-1], len(weight_NK)
    if not x.is_cuda or not 0 < M <= FEW or not N or not _kernel_runs(x.device):
        return None
    from lightning_compress.ops.w8a8_gemm import kernel

    return kernel.prepare(x, scale, weight_NK, scale_N)


def _check_linear(x: Tensor, weight_NK: Tensor, scale_N: Tensor, scale: Tensor | None) -> None:
    _check_tokens(x, weight_NK.dtype)
    if scale is not None and (scale.shape != (1,) or not scale.is_floating_point()):
        raise ValueError(f"expected one floating scale [1], got {scale.dtype} {tuple(scale.shape)}")
    N = len(weight_NK) if weight_NK.ndim else 0
    if weight_NK.shape != (N, x.shape[-1]) or scale_N.shape not in ((N,), (1,)) or scale_N.dtype != torch.float32:
        raise ValueError(
            f"expected x [..., K], weight [N, K] and its float32 scale [N] or [1], got {tuple(x.shape)}, "
            f"{tuple(weight_NK.shape)} and {scale_N.dtype} {tuple(scale_N.shape)}"
        )
    _check_place("x is", (x,) if scale is None else (x, scale), (weight_NK, scale_N))


def _check_tokens(x: Tensor, kind: torch.dtype) -> None:
    if x.dtype not in KERNEL_DTYPES or not x.ndim or not x.shape[-1]:
        raise ValueError(f"expected x [..., K] in float16, bfloat16 or float32, got {x.dtype} {tuple(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"expected codes of int8 or float8_e4m3fn, got {kind}")


def _check_place(what: str, tokens: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> None:
    if len({t.device for t in (*tokens, *weights)}) > 1:
        raise ValueError(f"{what} on {tokens[0].device}, the weight is on {weights[0].device}; put them on one device")
    if not weights[0].is_contiguous():
        raise ValueError("the weight must be contiguous; call .contiguous() once, after loading")


def _quantize(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    x_MK = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(x_MK) and _kernel_runs(x.device):
        from lightning_compress.ops.w8a8_gemm.kernel import quantize_tokens as quantize
    else:
        quantize = reference.quantize_tokens
    codes_MK, scale_M = quantize(x_MK, kind)
    return codes_MK.view(x.shape), scale_M.view(x.shape[:-1])


def _quantize_static(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    if calls_kernel(x) and x.numel() and _kernel_runs(x.device):
        from lightning_compress.ops.w8a8_gemm.kernel import quantize_static

        return quantize_static(x.reshape(-1, x.shape[-1]), scale, kind).view(x.shape)
    return reference.quantize(x, scale, kind)


def _linear(x: Tensor, weight_NK: Tensor, scale_N: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return _gemm(*_quantize(x, weight_NK.dtype), weight_NK, scale_N, x.dtype)
    return _gemm(_quantize_static(x, scale, weight_NK.dtype), scale.float(), weight_NK, scale_N, x.dtype)


def _gemm(codes: Tensor, scale: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    N, K = weight_NK.shape
    codes_MK, scale_M = codes.reshape(-1, K).contiguous(), scale.reshape(-1).contiguous()
    M = len(codes_MK)
    by_torch = codes.is_cuda and M > 16 and _torch_multiplies(codes.device, codes.dtype, N, K)
    runs = codes.is_cuda and M > 0 and N > 0 and _kernel_runs(codes.device)
    if runs and not (by_torch and M > FEW):
        from lightning_compress.ops.w8a8_gemm.kernel import gemm

        y_MN = gemm(codes_MK, scale_M, weight_NK, scale_N, dtype)
    elif codes.dtype == torch.int8:
        sums_MN = torch._int_mm(codes_MK, weight_NK.t()) if by_torch else _exact(codes_MK, weight_NK)
        y_MN = _scaled(sums_MN, scale_M, scale_N, dtype, runs)
    elif by_torch:
        y_MN = _by_scaled_mm(codes_MK, scale_M, weight_NK, scale_N, dtype, runs)
    else:
        y_MN = (codes_MK.float() @ weight_NK.float().t() * scale_N * scale_M[:, None]).to(dtype)
    return y_MN.view(*codes.shape[:-1], N)


def _torch_multiplies(device: torch.device, kind: torch.dtype, N: int, K: int) -> bool:
    """Whether cuBLASLt supports weights of this shape and dtype."""
    if kind == torch.int8:
        return N % 8 == 0 and K % 8 == 0
    return N % 16 == 0 and K % 16 == 0 and torch.cuda.get_device_capability(device) >= (8, 9)


def _by_scaled_mm(
    codes_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype, runs: bool = False
) -> Tensor:
    """y [M, N] by torch's FP8 product, which supports scales by row and column for bf16 results only."""
    by_row = len(scale_M) > 1 or len(scale_N) > 1
    if by_row and dtype == torch.bfloat16:
        rows = scale_M.expand(len(codes_MK)).contiguous()[:, None], scale_N.expand(len(weight_NK)).contiguous()[None]
        return torch._scaled_mm(codes_MK, weight_NK.t(), *rows, out_dtype=dtype)
    if not by_row:
        return torch._scaled_mm(codes_MK, weight_NK.t(), scale_M, scale_N, out_dtype=dtype)
    one = torch.ones(1, device=codes_MK.device, dtype=torch.float32)
    sums_MN = torch._scaled_mm(codes_MK, weight_NK.t(), one, one, out_dtype=torch.float32)
    return _scaled(sums_MN, scale_M, scale_N, dtype, runs)


def _scaled(sums_MN: Tensor, scale_M: Tensor, scale_N: Tensor, dtype: torch.dtype, runs: bool) -> Tensor:
    """y [M, N], in one pass where kernels run: torch makes three."""
    if runs:
        from lightning_compress.ops.w8a8_gemm.kernel import scale_sums

        return scale_sums(sums_MN, scale_M, scale_N, dtype)
    return (sums_MN * scale_N * scale_M[:, None]).to(dtype)


def _exact(codes_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """int32 [M, N] by float32 products; torch's int8 product is slow on CPUs without VNNI."""
    sums_MN = torch.zeros(len(codes_MK), len(weight_NK), dtype=torch.int32, device=codes_MK.device)
    for x, w in zip(codes_MK.split(EXACT, 1), weight_NK.split(EXACT, 1), strict=True):
        sums_MN += (x.float() @ w.float().t()).int()
    return sums_MN


def _kernel_runs(device: torch.device) -> bool:
    return kernel_runs(device, "8-bit products are computed by torch")


def _dense(weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight_NK.float() * scale_N[:, None]).to(dtype)


def _quantize_fake(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape[:-1], dtype=torch.float32)


_quantize_op = register_op(
    "quantize_tokens", "(Tensor x, ScalarType kind) -> (Tensor, Tensor)", _quantize, _quantize_fake
)
_gemm_op = register_op(
    "w8a8_gemm",
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, ScalarType dtype) -> Tensor",
    _gemm,
    lambda codes, scale, weight, weight_scale, dtype: codes.new_empty(*codes.shape[:-1], weight.shape[0], dtype=dtype),
)
_linear_op = product_op(
    "w8a8_linear", "Tensor weight, Tensor weight_scale", _linear, _dense, options="Tensor? scale", packed=False
)
