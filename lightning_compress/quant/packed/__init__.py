"""Linears and convolutions that compute on the tensors of a compressed checkpoint, without a serving engine."""

from lightning_compress.quant.packed.convolution import Int8Conv2d, multiply_codes
from lightning_compress.quant.packed.dequantize import dequantize
from lightning_compress.quant.packed.dispatch import check_dispatch
from lightning_compress.quant.packed.linear import PackedLinear
from lightning_compress.quant.packed.replace import (
    Packing,
    PackingChoice,
    as_linears,
    is_packable,
    pack_linears,
    unpacked,
)
from lightning_compress.quant.packed.siblings import fuse_siblings

__all__ = [
    "Int8Conv2d", "PackedLinear", "Packing", "PackingChoice", "as_linears", "check_dispatch", "dequantize",
    "fuse_siblings", "is_packable", "multiply_codes", "pack_linears", "unpacked",
]  # fmt: skip
