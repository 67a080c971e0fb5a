"""A quantized model as a dense one that may be quantized again."""

import torch
from torch import nn

from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.module_weights import hide
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.packed.convolution import restore_class
from lightning_compress.quant.packed.linear import PackedLinear
from lightning_compress.quant.record import Quantized

__all__ = ["dequantize"]


def dequantize(model: nn.Module) -> list[str]:
    """Remove the quantization of a model, in place: weights keep their values, and inputs are no longer rounded.

    Call it before ``compress`` when weights have left their grid, as by merging an adapter or by training. Rotations
    that run beside modules stay, since the weights hold their other half.

    Args:
        model: A model from ``compress`` or ``load``. Packed Linears become ``nn.Linear``, in the dtype of the model.

    Returns:
        Names of the modules, and of those whose KV cache was quantized.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, module in packed.items():
        if not name:
            raise ValueError("the model is a packed Linear itself and cannot be replaced; put it into a module")
        model.set_submodule(name, _linear(module))
    names = [*packed]
    for kind in (Quantized, QuantizedCache):
        records = kind.find(model)
        for layer, _ in records.values():
            kind.detach(layer)
            restore_class(layer)
        names += map(clean_name, records)
    hide(model)
    return names


@torch.no_grad()
def _linear(packed: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False)
    linear.weight = nn.Parameter(packed.dense(packed.dtype))
    linear.register_parameter("bias", packed.bias)
    return linear.train(packed.training)
