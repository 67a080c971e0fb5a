"""A Llama with a quantized KV cache, for tests of the modifier, of the cache and of exports."""

import torch
from torch import nn

from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress

IDS = torch.arange(24).reshape(2, 12)


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or {"input_ids": IDS})).logits


def quantized(model, weights, **arguments):
    modifiers = [KVCacheModifier(**arguments)]
    if weights:
        modifiers.append(QuantizationModifier(scheme="W4A16", ignore=["lm_head"]))
    compress(model, modifiers, [{"input_ids": IDS}])
    return model


def keys_and_values(model):
    """What the first layer put into its cache: [B, H, T, D] each."""
    with torch.no_grad():
        layer = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    return layer.keys, layer.values


def shifted(model):
    """Values of the first layer off zero."""
    attention = model.model.layers[0].self_attn
    attention.v_proj.bias = nn.Parameter(torch.full((attention.v_proj.out_features,), 0.5))
    return model
