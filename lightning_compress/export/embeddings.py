"""Embeddings on disk, such that plain transformers loads them correctly.

transformers 5.23 gives a model packed parameters before it reads the file, then initializes missing weights, and for
that every model reads the ``weight`` of its embeddings: packed ones (``weight_packed``) raise AttributeError.
Where one scheme without activations holds for all of a model, ``dequantize`` in quantization_config avoids that layout
(plain_transformers.mend_layout). Elsewhere integers are written unpacked, a byte for each code, as ``weight``, and
other formats stay dense. An embedding whose ``forward`` takes other arguments than token ids (the learned positions of
OPT and BART) stays dense there too: compressed-tensors 0.20 calls quantized modules with one input.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.matrix import is_embedding
from lightning_compress.quant.packing import is_packable, tensor_names
from lightning_compress.quant.record import Quantized

__all__ = ["unpackable_embeddings", "unpacked"]

UNPACKED = CompressionFormat.naive_quantized


def unpackable_embeddings(records: Mapping[str, tuple[nn.Module, Quantized]], caches: bool) -> dict[str, str | None]:
    """Embeddings that a model of transformers cannot hold packed; None, or why they cannot be unpacked codes either.

    ``records`` are those of modules that may be packed; ``caches``: whether the KV cache is quantized too.
    """
    schemes = [record.scheme for module, record in records.values() if is_packable(module)]
    if not caches and all(_alone(scheme, schemes[0]) for scheme in schemes):
        return {}
    reasons: dict[str, str | None] = {}
    for name, (module, record) in records.items():
        if not is_embedding(module) or not is_packable(module):
            continue
        if "weight" not in tensor_names(type(module), record.scheme):
            is_integer = record.scheme.weights.type == "int"
            reasons[name] = None if is_integer else "beside other schemes transformers cannot load it packed"
        if len(inspect.signature(type(module).forward).parameters) != 2:  # self and the ids
            reasons[name] = f"transformers cannot call a packed {type(module).__name__}"
    return reasons


def unpacked(record: Quantized) -> Quantized:
    """The record with the format of codes that are written a byte each."""
    return replace(record, scheme=record.scheme.model_copy(update={"format": UNPACKED}))


def _alone(scheme: QuantizationScheme, first: QuantizationScheme) -> bool:
    same = scheme.model_dump(exclude={"targets"}) == first.model_dump(exclude={"targets"})
    return same and scheme.input_activations is None
