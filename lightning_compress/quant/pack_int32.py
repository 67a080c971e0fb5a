"""A weight of integer codes in 32-bit words, as the pack-quantized format stores it, packed by ops/pack."""

from collections.abc import Mapping

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import Tensor

from lightning_compress.ops.pack import pack

__all__ = ["compress_words"]


def compress_words(state: Mapping[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The result of ``PackedQuantizationCompressor.compress``, bit for bit, on the device of the weight.

    Args:
        state: ``weight`` [R, C], float32 or wider, on the grid of ``weight_scale`` and ``weight_zero_point``.
        scheme: A scheme with integer weights.
    """
    args = scheme.weights
    tensors = {name: value for name, value in state.items() if name not in ("weight", "weight_zero_point")}
    zero = state.get("weight_zero_point")
    codes = quantize(state["weight"], state["weight_scale"], zero, args, dtype=torch.int8)
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    tensors |= {"weight_packed": pack(codes, args.num_bits), "weight_shape": shape}
    if not args.symmetric and zero is not None:
        in_words = args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        tensors["weight_zero_point"] = pack(zero, args.num_bits, 0) if in_words else zero
    return tensors
