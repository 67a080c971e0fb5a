"""Min-max, scale, zero point, rounding and packing of a weight in one pass: plain round-to-nearest.

On CUDA a Triton kernel reads W once and writes the results; elsewhere torch executes the steps one by one. Results are
bit for bit those of compressed-tensors' calculate_qparams, quantize and pack_to_int32. README beside this file.

Shapes: N rows, K columns, G groups of K / G columns in a row, P = ceil(K bits / 32) words.
"""

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.group_quant import reference
from lightning_compress.ops.pack.lanes import pack_rows
from lightning_compress.ops.registration import register_op

__all__ = ["group_quant", "group_round"]


def group_quant(W_NK: Tensor, group: int, bits: int, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words int32 [N, P], scale [N, G] in the dtype of W, and zero point int8 [N, G], or None (symmetric).

    Args:
        W_NK: Weight, float16, bfloat16 or float32, finite.
        group: Number of columns that share a scale; K for one scale per row.
        bits: Bits of a code, 2 to 8.
        symmetric: The grid has no zero point.

    Raises:
        ValueError: Wrong dtype, shape or number of bits, or the group does not divide K.
    """
    _check(W_NK, group, bits)
    return _dispatch(W_NK, group, bits, symmetric, False, True)


def group_round(
    W_NK: Tensor, group: int, bits: int = 8, symmetric: bool = True, float8: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with the dequantized weight W^ [N, K], in the dtype of W, in place of words.

    Rows of activations are tokens: with ``group`` = K this is dynamic quantization per token. ``float8``: round to FP8
    (e4m3) in place of integers, symmetric only. Other arguments are those of :func:`group_quant`.

    Raises:
        ValueError: As for :func:`group_quant`, or FP8 with a zero point.
    """
    _check(W_NK, group, bits)
    if float8 and not symmetric:
        raise ValueError("FP8 has no zero point; pass symmetric=True, or float8=False")
    return _dispatch(W_NK, group, bits, symmetric, float8, False)


def _check(W_NK: Tensor, group: int, bits: int) -> None:
    if W_NK.dtype not in KERNEL_DTYPES or W_NK.ndim != 2:
        raise ValueError(
            f"expected W [N, K] in float16, bfloat16 or float32, got {W_NK.dtype} {tuple(W_NK.shape)}; convert "
            f"and reshape it"
        )
    if not 2 <= bits <= 8:
        raise ValueError(f"expected 2 to 8 bits, got {bits}")
    K = W_NK.shape[1]
    if group < 1 or K % group or not K:
        raise ValueError(f"groups of {group} columns do not divide K={K}; pass a divisor, or K for one scale per row")


def _dispatch(
    W_NK: Tensor, group: int, bits: int, symmetric: bool, float8: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    W_NK = W_NK.detach()
    if torch.compiler.is_compiling() or (W_NK.is_cuda and not calls_kernel(W_NK)):
        out, scale_NG, zero_NG = _op(W_NK, group, bits, symmetric, float8, packed)
        return out, scale_NG, None if symmetric else zero_NG
    return _group_quant(W_NK, group, bits, symmetric, float8, packed)


def _group_quant(
    W_NK: Tensor, group: int, bits: int, symmetric: bool, float8: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if W_NK.is_cuda and len(W_NK) and _kernel_runs(W_NK, group, packed):
        from lightning_compress.ops.group_quant import kernel

        return kernel.group_quant(W_NK, group, bits, symmetric, float8, packed)
    scale_NG, zero_NG = reference.qparams(W_NK, group, bits, symmetric, float8)
    q_NK = reference.codes(W_NK, scale_NG, zero_NG, bits, float8)
    out = pack_rows(q_NK.to(torch.int8), bits) if packed else reference.values(q_NK, scale_NG, zero_NG)
    return out, scale_NG, zero_NG


def _kernel_runs(W_NK: Tensor, group: int, packed: bool) -> bool:
    straddles = packed and group % 32 and group != W_NK.shape[1]
    unfit = f"the group size {group} is not a multiple of 32" if straddles else None
    return kernel_runs(W_NK.device, "weights are quantized and packed by dozens of kernels of torch", unfit)


def _group_quant_tensors(
    W: Tensor, group: int, bits: int, symmetric: bool, float8: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With an empty zero point for a symmetric grid, since an op cannot return None."""
    out, scale, zero = _group_quant(W, group, bits, symmetric, float8, packed)
    return out, scale, scale.new_empty((0,), dtype=torch.int8) if zero is None else zero


def _fake(
    W: Tensor, group: int, bits: int, symmetric: bool, float8: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = W.shape
    G = K // group
    out = W.new_empty((N, (K * bits + 31) // 32), dtype=torch.int32) if packed else W.new_empty((N, K))
    return out, W.new_empty((N, G)), W.new_empty((0,) if symmetric else (N, G), dtype=torch.int8)


_op = register_op(
    "group_quant",
    "(Tensor W, SymInt group, SymInt bits, bool symmetric, bool float8, bool packed) -> (Tensor, Tensor, Tensor)",
    _group_quant_tensors,
    _fake,
)
