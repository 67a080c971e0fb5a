"""Formats of small floats, and of scales that are not plain floats.

    E2M1 (4 bits)   0 .5 1 1.5 2 3 4 6               E2M3 (6 bits)   up to 7.5         E4M3 (8 bits)   up to 448
    NVFP4           E2M1, for 16 columns a scale in E4M3, for the tensor one in float32:  w = c * s / g
    MXFP4, 6, 8     E2M1, E2M3, E4M3, for 32 columns a scale that is a power of two (E8M0, OCP Microscaling v1.0)

In this package the scale of a weight is always the factor of its codes, in float32 for these formats: s / g
for NVFP4 (g = 448 * 6 / max|W|, so that the largest s is the largest E4M3 number). compressed-tensors decompresses them
to bfloat16, whatever the model's dtype; so their dequantized values are rounded to bfloat16 here too, and what runs
here is what a reload computes.

Shapes: R rows, C columns, G groups.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import generate_gparam
from torch import Tensor

from lightning_compress.ops.gptq_block.grid import EXPONENT, LARGEST, MANTISSA, round_float_

__all__ = [
    "LARGEST_SCALE",
    "global_scale_of",
    "has_global_scale",
    "is_microscaled",
    "round_float_",
    "scale_shape",
    "stored_as",
    "stored_scale",
]

LARGEST_SCALE = 448.0  # of E4M3


def is_microscaled(args: QuantizationArgs) -> bool:
    """True for NVFP4, MXFP4, MXFP6, MXFP8: formats whose scales have a format of their own."""
    return args.scale_dtype is not None


def has_global_scale(args: QuantizationArgs) -> bool:
    """True for NVFP4."""
    return QuantizationStrategy(args.strategy) == QuantizationStrategy.TENSOR_GROUP


def scale_shape(args: QuantizationArgs, rows: int, columns: int) -> tuple[int, ...] | None:
    """The shape of the scale, and of the zero point, of a weight [R, C]; None for a strategy that is not of weights."""
    high, wide = args.block_structure or (1, 1)
    groups = columns // (args.group_size or columns)
    shapes = {
        QuantizationStrategy.TENSOR: (1,),
        QuantizationStrategy.CHANNEL: (rows, 1),
        QuantizationStrategy.GROUP: (rows, groups),
        QuantizationStrategy.TENSOR_GROUP: (rows, groups),
        QuantizationStrategy.BLOCK: (-(-rows // high), -(-columns // wide)),
    }
    return shapes.get(QuantizationStrategy(args.strategy))


def global_scale_of(low: Tensor, high: Tensor) -> Tensor:
    """g = 448 * 6 / max(|low|, |high|), float32 [1]; 1 where that is not finite."""
    scale: Tensor = generate_gparam(low.float(), high.float())
    return scale


def stored_as(W_RC: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> Tensor:
    """Dequantized weights as a loader computes them, in ``dtype``: microscaled ones pass through bfloat16."""
    return (W_RC.to(torch.bfloat16) if is_microscaled(args) else W_RC).to(dtype)


def spacing(x: Tensor, bits: int) -> Tensor:
    """The distance between the numbers of a format (4, 6 or 8 bits) on either side of x, of the larger ones at one."""
    _, exponent = torch.frexp(x.abs().clamp(2.0 ** EXPONENT[bits], LARGEST[bits]))  # 2^exponent > x
    return torch.ldexp(torch.ones_like(x), exponent - 1 - MANTISSA[bits])


def stored_scale(scale: Tensor, args: QuantizationArgs, global_scale: Tensor | None) -> Tensor:
    """The nearest scale that a microscaled format stores, float32: E4M3 over g, or a power of two.

    ``scale`` is positive. A scale that is stored already stays, bit for bit. That of a power of two is nearest by the
    ratio: 1.4 becomes 1, and 1.5 becomes 2.
    """
    if global_scale is not None:
        least = 2.0**-9
        codes = (scale * global_scale).clamp(least, LARGEST_SCALE).to(torch.float8_e4m3fn)
        return codes.float() / global_scale
    fraction, exponent = torch.frexp(scale)  # scale = fraction 2^exponent, 1/2 <= fraction < 1
    exponent = torch.where(fraction < 0.5**0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(scale), exponent)
