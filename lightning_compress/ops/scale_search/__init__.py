"""Scales and zero points of a weight that minimize sum_j h_j |error_j|^p: extremes and search in one kernel.

On CUDA a Triton kernel reads W once for groups and keeps it in registers; elsewhere torch tries every factor for every
row (the search of quant/scales.py has a faster path for a CPU, with the same bits). README beside this file.

Shapes: N rows, K columns, G groups of K / G columns in a row.
"""

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.gptq_block.grid import LARGEST
from lightning_compress.ops.registration import register_op
from lightning_compress.ops.scale_search import reference

__all__ = ["scale_search", "scale_sweep"]


def scale_search(
    W_NK: Tensor,
    importance_K: Tensor,
    group: int,
    bits: int,
    symmetric: bool = True,
    float8: bool = False,
    power: float = 2.0,
) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] in the dtype of W, and zero point int8 [N, G], or None (symmetric).

    Args:
        W_NK: Weight, float16, bfloat16 or float32, finite.
        importance_K: h, float32, at least 0.
        group: Number of columns that share a scale; K for one scale per row.
        bits: Bits of a code, 2 to 8.
        symmetric: The grid has no zero point.
        float8: Codes are those of FP8 (e4m3), symmetric, with 8 bits.
        power: p.

    Raises:
        ValueError: Wrong dtype, shape or number of bits, the group does not divide K, or FP8 with a zero point.
    """
    _check(W_NK, importance_K, group, bits)
    if float8 and (not symmetric or bits != 8):
        raise ValueError(f"FP8 has 8 bits and no zero point, got bits={bits}, symmetric={symmetric}")
    W_NK = W_NK.detach()
    if torch.compiler.is_compiling() or (W_NK.is_cuda and not calls_kernel(W_NK)):
        scale_NG, zero_NG = _op(W_NK, importance_K, group, bits, symmetric, float8, power)
        return scale_NG, None if symmetric else zero_NG
    return _scale_search(W_NK, importance_K, group, bits, symmetric, float8, power)


def scale_sweep(
    W_NK: Tensor,
    scale_NG: Tensor,
    importance_K: Tensor,
    bits: int,
    global_scale: Tensor | None = None,
    power: float = 2.0,
) -> Tensor:
    """Of the scales that NVFP4 or an MX format can store near those of the extremes the best, float32 [N, G].

    Args:
        W_NK: Weight, float16, bfloat16 or float32, finite.
        scale_NG: Scales of the extremes, float32, positive.
        importance_K: h, float32, at least 0.
        bits: Codes, 4 (E2M1), 6 (E2M3) or 8 (E4M3).
        global_scale: Scales are E4M3 numbers over this one, float32 [1]; None: powers of two.
        power: p.

    Raises:
        ValueError: Wrong dtype, shape or number of bits.
    """
    _check(W_NK, importance_K, W_NK.shape[-1] // max(1, scale_NG.shape[-1]), bits)
    if bits not in LARGEST or scale_NG.dtype != torch.float32 or scale_NG.shape[:-1] != W_NK.shape[:-1]:
        raise ValueError(
            f"expected 4, 6 or 8 bits and float32 scales of {len(W_NK)} rows, got {bits} bits and {scale_NG.dtype} "
            f"{tuple(scale_NG.shape)}"
        )
    W_NK = W_NK.detach()
    if torch.compiler.is_compiling() or (W_NK.is_cuda and not calls_kernel(W_NK)):
        swept_NG: Tensor = _sweep_op(W_NK, scale_NG, importance_K, bits, global_scale, power)
        return swept_NG
    return _scale_sweep(W_NK, scale_NG, importance_K, bits, global_scale, power)


def _check(W_NK: Tensor, importance_K: Tensor, group: int, bits: int) -> None:
    if W_NK.dtype not in KERNEL_DTYPES or W_NK.ndim != 2:
        raise ValueError(
            f"expected W [N, K] in float16, bfloat16 or float32, got {W_NK.dtype} {tuple(W_NK.shape)}; convert "
            f"and reshape it"
        )
    K = W_NK.shape[1]
    if importance_K.dtype != torch.float32 or importance_K.shape != (K,) or importance_K.device != W_NK.device:
        raise ValueError(
            f"expected one importance for each of {K} columns, float32 on {W_NK.device}, got {importance_K.dtype} "
            f"{tuple(importance_K.shape)} on {importance_K.device}"
        )
    if not 2 <= bits <= 8:
        raise ValueError(f"expected 2 to 8 bits, got {bits}")
    if group < 1 or K % group or not K:
        raise ValueError(f"groups of {group} columns do not divide K={K}; pass a divisor, or K for one scale per row")


def _scale_search(
    W_NK: Tensor, importance_K: Tensor, group: int, bits: int, symmetric: bool, float8: bool, power: float
) -> tuple[Tensor, Tensor | None]:
    if W_NK.is_cuda and len(W_NK) and kernel_runs(W_NK.device, "scales are searched by hundreds of kernels of torch"):
        from lightning_compress.ops.scale_search import kernel

        return kernel.scale_search(W_NK, importance_K, group, bits, symmetric, float8, power)
    return reference.scale_search(W_NK, importance_K, group, bits, symmetric, float8, power)


def _scale_search_tensors(
    W: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool, float8: bool, power: float
) -> tuple[Tensor, Tensor]:
    """With an empty zero point for a symmetric grid, since an op cannot return None."""
    scale, zero = _scale_search(W, importance, group, bits, symmetric, float8, power)
    return scale, scale.new_empty((0,), dtype=torch.int8) if zero is None else zero


def _fake(
    W: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool, float8: bool, power: float
) -> tuple[Tensor, Tensor]:
    N, G = W.shape[0], W.shape[1] // group
    return W.new_empty((N, G)), W.new_empty((0,) if symmetric else (N, G), dtype=torch.int8)


_op = register_op(
    "scale_search",
    "(Tensor W, Tensor importance, SymInt group, SymInt bits, bool symmetric, bool float8, float power) "
    "-> (Tensor, Tensor)",
    _scale_search_tensors,
    _fake,
)


def _scale_sweep(
    W: Tensor, scale: Tensor, importance: Tensor, bits: int, global_scale: Tensor | None, power: float
) -> Tensor:
    if W.is_cuda and len(W) and kernel_runs(W.device, "scales are searched by hundreds of kernels of torch"):
        from lightning_compress.ops.scale_search import sweep

        return sweep.scale_sweep(W, scale, importance, bits, global_scale, power)
    return reference.scale_sweep(W, scale, importance, bits, global_scale, power)


_sweep_op = register_op(
    "scale_sweep",
    "(Tensor W, Tensor scale, Tensor importance, SymInt bits, Tensor? global_scale, float power) -> Tensor",
    _scale_sweep,
    lambda W, scale, *_: scale.new_empty(scale.shape),
)
