"""Embeddings as targets: which schemes they can have, and tables that several modules share.

A token selects its row, y = W[token]: no column of W is multiplied by an input, and no row is combined with another. So
the error of the output is the error of each row by itself, whatever the data, and with one scale per row or group the
best grid is the one with the least squared error. (An EmbeddingBag adds rows; how errors of tokens that occur together
combine there is not considered.)
"""

from collections.abc import Collection, Mapping
from typing import Literal

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.matrix import is_embedding

__all__ = ["Embeddings", "check_embeddings", "check_trainable", "is_one_table", "sharers"]

Embeddings = Literal["refused", "alone", "shared"]
"""What a modifier does with embeddings: refuse them, accept those with a table of their own, or accept all."""


def check_embeddings(schemes: Mapping[str, QuantizationScheme], modules: Mapping[str, nn.Module]) -> None:
    """ValueError names embeddings whose scheme quantizes their inputs, or that rewrite rows when they are used."""
    tables = {name: module for name, module in modules.items() if is_embedding(module)}
    if fed := [name for name in tables if schemes[name].input_activations is not None]:
        raise ValueError(
            f"the inputs of {shortlist(map(repr, fed))} are numbers of tokens, which no scheme quantizes; give "
            f"embeddings a scheme of weights alone, such as scheme={{'W8A16': ['Embedding'], 'W8A8': ['Linear']}}"
        )
    if scaled := [name for name, module in tables.items() if getattr(module, "max_norm", None) is not None]:
        raise ValueError(
            f"max_norm of {shortlist(map(repr, scaled))} rescales rows in place when they are looked up, which takes "
            f"them off their grid; set module.max_norm = None (after training its rows are that short already), or add "
            f"them to ignore"
        )


def check_trainable(modules: Mapping[str, nn.Module]) -> None:
    """ValueError names embeddings with sparse gradients, which fake-quantization cannot pass on."""
    if sparse := [n for n, module in modules.items() if is_embedding(module) and getattr(module, "sparse", False)]:
        raise ValueError(
            f"the gradient of {shortlist(map(repr, sparse))} is sparse, which fake-quantization cannot pass on; build "
            f"with sparse=False, or add them to ignore"
        )


def is_one_table(
    owners: Collection[nn.Module], modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]
) -> bool:
    """True when all modules that hold a parameter are embeddings, quantized by the same grid."""
    names = {id(module): name for name, module in modules.items()}
    if not all(is_embedding(owner) and id(owner) in names for owner in owners):
        return False
    grids = [schemes[names[id(owner)]].weights for owner in owners]
    return all(grid == grids[0] for grid in grids)


def sharers(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Other modules that hold the parameter of embedding ``name``."""
    table = modules[name].weight
    return [other for other, module in modules.items() if other != name and getattr(module, "weight", None) is table]
