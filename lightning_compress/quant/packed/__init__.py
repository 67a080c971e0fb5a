"""Linears that compute on the tensors of a compressed checkpoint, without a serving engine."""

from lightning_compress.quant.packed.dequantize import dequantize
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
    "PackedLinear", "Packing", "PackingChoice", "as_linears", "dequantize", "fuse_siblings", "is_packable",
    "pack_linears", "unpacked",
]  # fmt: skip
