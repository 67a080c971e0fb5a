"""Error and size of a quantized weight, for the ledger."""

import math
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from lightning_compress.quant.formats import has_global_scale, is_microscaled, scale_shape
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

__all__ = ["planned_bytes", "record_without_values", "sqnr_db", "stored_bytes", "weight_error", "weight_facts"]


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


def record_without_values(W_RC: Tensor, scheme: QuantizationScheme) -> Quantized:
    """The record that a weight will get, with tensors on meta: their shapes and dtypes are those of the real ones."""
    weights, inputs = scheme.weights, scheme.input_activations
    dtype = torch.float32 if is_microscaled(weights) else W_RC.dtype

    def blank(shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape = scale_shape(weights, *W_RC.shape)
    static = inputs is not None and inputs.dynamic is False
    return Quantized(
        scheme=scheme,
        scale=blank(shape, dtype),
        zero_point=None if weights.symmetric else blank(shape, torch.int8),
        global_scale=blank(1, torch.float32) if has_global_scale(weights) else None,
        input_scale=blank(1, W_RC.dtype) if static else None,
        input_zero_point=blank(1, torch.int8) if static and not inputs.symmetric else None,
        input_global_scale=blank(1, torch.float32) if inputs is not None and has_global_scale(inputs) else None,
    )


def planned_bytes(W_RC: Tensor, scheme: QuantizationScheme) -> int:
    """:func:`stored_bytes` of a weight that is not quantized yet."""
    return stored_bytes(record_without_values(W_RC, scheme), *W_RC.shape)


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
