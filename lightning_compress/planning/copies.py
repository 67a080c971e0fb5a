"""Copies of a model to plan on: without weights, for set-up and sizes, or with the first few of its blocks, to time."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.layers.blank import blank_of, is_blank
from lightning_compress.structure.blocks import find_layers
from lightning_compress.structure.config import is_transformers, layer_fields
from lightning_compress.structure.surgery import cut_layers

__all__ = ["first_blocks", "without_weights"]


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are blanks on the meta device; those that are tied stay tied."""
    tensors = {id(t): t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())
               if t is not None}  # fmt: skip
    copied: nn.Module = copy.deepcopy(model, {key: blank_of(tensor) for key, tensor in tensors.items()})
    return copied


def first_blocks(model: nn.Module, count: int) -> tuple[nn.Module, int] | None:
    """A copy with the first ``count`` blocks, and how many the model has; None where its blocks are not one list.

    A model of transformers without weights gets random ones.
    """
    try:
        path = find_layers(model)
    except ValueError:
        return None
    blocks = list(model.get_submodule(path).children())
    if len(blocks) <= count:
        return None
    indices = list(range(count))
    fields = layer_fields(model.config, len(blocks), indices) if is_transformers(model) else {}
    if any(is_blank(parameter) for parameter in model.parameters()):
        return (_built(model, fields), len(blocks)) if fields else None
    shared = {id(block): block for block in blocks[count:]}  # they are cut from the copy: no copy of their weights
    copied: nn.Module = copy.deepcopy(model, dict(shared))
    cut_layers(copied, path, indices, config=fields)
    return copied, len(blocks)


def _built(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """A model of transformers from the config with other ``fields``, in the dtype of ``model``."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    built: nn.Module = type(model)(config).to(dtype).eval()
    return built
