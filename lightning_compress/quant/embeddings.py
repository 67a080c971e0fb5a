"""Embeddings as targets: which schemes they can follow, and tables that several modules look up.

Tokens look their row up, y = W[token]: no column of W meets an input, no row another one. So the error of the output is
that of the rows, each apart, whatever the data; with one scale per row or group nothing beats the nearest point of the
grid that loses least squares. (An EmbeddingBag adds rows up; what errors of tokens that come together do to each other
is not looked at.)
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.matrix import is_embedding

__all__ = ["Embeddings", "check_embeddings", "check_trainable", "is_one_table", "sharers"]

Embeddings = Literal["refused", "alone", "shared"]
"""What a modifier does with embeddings: refuse them, take those that share their table with nobody, or all."""


def check_embeddings(schemes: Mapping[str, QuantizationScheme], modules: Mapping[str, nn.Module]) -> None:
    """ValueError names embeddings whose scheme quantizes their inputs, or that rewrite their rows when they are used.

    Args:
        schemes: By dotted name.
        modules: The same names.
    """
    tables = {name: module for name, module in modules.items() if is_embedding(module)}
    if fed := [name for name in tables if schemes[name].input_activations is not None]:
        raise ValueError(
            f"the inputs of {_listed(fed)} are numbers of tokens, which no scheme quantizes; give embeddings a scheme "
            f"of weights alone, such as scheme={{'W8A16': ['Embedding'], 'W8A8': ['Linear']}}"
        )
    if scaled := [name for name, module in tables.items() if getattr(module, "max_norm", None) is not None]:
        raise ValueError(
            f"max_norm of {_listed(scaled)} rescales rows in place when they are looked up, which takes them off their "
            f"grid; set module.max_norm = None (after training its rows are that short already), or add them to ignore"
        )


def check_trainable(modules: Mapping[str, nn.Module]) -> None:
    """ValueError names embeddings with sparse gradients, which fake-quantization cannot pass on."""
    if sparse := [n for n, module in modules.items() if is_embedding(module) and getattr(module, "sparse", False)]:
        raise ValueError(
            f"the gradient of {_listed(sparse)} is sparse, which fake-quantization cannot pass on; build with "
            f"sparse=False, or add them to ignore"
        )


def is_one_table(
    owners: Collection[nn.Module], modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]
) -> bool:
    """True when all who hold a parameter are embeddings, and all of them are quantized alike.

    Args:
        owners: Who holds it.
        modules: What is quantized.
        schemes: Theirs.
    """
    names = {id(module): name for name, module in modules.items()}
    if not all(is_embedding(owner) and id(owner) in names for owner in owners):
        return False
    grids = [schemes[names[id(owner)]].weights for owner in owners]
    return all(grid == grids[0] for grid in grids)


def sharers(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Other modules that hold the parameter of embedding ``name``."""
    table = modules[name].weight
    return [other for other, module in modules.items() if other != name and getattr(module, "weight", None) is table]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
