"""Bytes of a model before and after quantization, from shapes and schemes alone."""

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.export.contents import contents_of
from lightning_compress.layers.matrix import as_matrix, weight_of
from lightning_compress.quant.formats import has_global_scale, is_microscaled, scale_shape
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.weight_metrics import stored_bytes

__all__ = ["dense_reasons", "model_bytes", "packed_bytes"]


def record_without_values(module: nn.Module, scheme: QuantizationScheme) -> Quantized:
    """The record that a module will carry, with tensors on meta: their shapes and dtypes are those of the real ones."""
    weight_RC, weights, inputs = as_matrix(module), scheme.weights, scheme.input_activations
    dtype = torch.float32 if is_microscaled(weights) else weight_RC.dtype

    def blank(shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape = scale_shape(weights, *weight_RC.shape)
    static = inputs is not None and inputs.dynamic is False
    shared = inputs is not None and has_global_scale(inputs)
    return Quantized(
        scheme=scheme,
        scale=blank(shape, dtype),
        zero_point=None if weights.symmetric else blank(shape, torch.int8),
        global_scale=blank(1, torch.float32) if has_global_scale(weights) else None,
        input_scale=blank(1, weight_RC.dtype) if static else None,
        input_zero_point=blank(1, torch.int8) if static and not inputs.symmetric else None,
        input_global_scale=blank(1, torch.float32) if shared else None,
    )


def packed_bytes(module: nn.Module, scheme: QuantizationScheme) -> int:
    """Bytes that replace the weight of a Linear or an Embedding in an export."""
    return stored_bytes(record_without_values(module, scheme), *as_matrix(module).shape)


def dense_reasons(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> dict[str, str]:
    """Modules whose weight an export writes dense although it is quantized, and why.

    ``model`` is a copy without weights, which gets records here.
    """
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        record_without_values(module, scheme).attach(module)
    return dict(contents_of(model, {}).dense)


def model_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of its state dict; tied ones count once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the dense weight."""
    return weight_of(module).nbytes
