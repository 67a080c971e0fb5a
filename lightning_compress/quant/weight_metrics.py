"""Error and size of a quantized weight, for the ledger."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

__all__ = ["sqnr_db", "stored_bytes", "weight_error", "weight_facts"]


def weight_facts(W_RC: Tensor, Q_RC: Tensor, quantized: Quantized, error: float | None = None) -> dict[str, Any]:
    """Facts for ``Ledger.add`` that need no data: scheme, sqnr_db, bits, params, bytes before and after.

    ``W_RC`` has the dtype that it is stored in; ``error`` is the value of :func:`weight_error`, where it is known.
    """
    size = stored_bytes(quantized, *W_RC.shape)
    return {
        "scheme": describe(quantized.scheme),
        "sqnr_db": sqnr_db(weight_error(W_RC, Q_RC) if error is None else error),
        "bits": 8 * size / W_RC.numel(),
        "params": W_RC.numel(),
        "bytes_before": W_RC.numel() * W_RC.element_size(),
        "bytes_after": size,
    }


def weight_error(W_RC: Tensor, Q_RC: Tensor) -> float:
    """||W - Q||^2 / ||W||^2; 0 for a weight of zeros."""
    norms = [torch.linalg.vector_norm(t) for t in (W_RC.float(), W_RC.float() - Q_RC.float())]
    norm, difference = torch.stack(norms).tolist()
    return (difference / norm) ** 2 if norm else 0.0


def sqnr_db(error: float) -> float | None:
    """-10 log10(relative error), in dB; None where there is no error to measure."""
    return -10 * math.log10(error) if error > 0 else None


def stored_bytes(quantized: Quantized, rows: int, columns: int) -> int:
    """Bytes of codes, scales, zero points and, where codes are packed, the shape, as compressed-tensors writes them.

    Integer weights alone are packed densely into int32 words; with quantized activations, and for FP8, a code takes
    a byte. Floats of 4 and 6 bits are packed into bytes, and scales of a format of their own take one byte.
    """
    weights = quantized.scheme.weights
    packed = weights.type == "int" and quantized.scheme.input_activations is None
    codes = 4 * rows * math.ceil(columns * weights.num_bits / 32) + 16 if packed else rows * columns
    if weights.type == "float":
        codes = rows * columns * weights.num_bits // 8
    size = codes + quantized.scale.numel() * (1 if is_microscaled(weights) else quantized.scale.element_size())
    if quantized.zero_point is not None:
        G = quantized.zero_point.numel() // rows if quantized.zero_point.ndim == 2 else 1
        size += 4 * G * math.ceil(rows * weights.num_bits / 32) if packed else quantized.zero_point.numel()
    for extra in (
        quantized.input_scale,
        quantized.input_zero_point,
        quantized.global_scale,
        quantized.input_global_scale,
    ):
        size += 0 if extra is None else extra.numel() * extra.element_size()
    return size
