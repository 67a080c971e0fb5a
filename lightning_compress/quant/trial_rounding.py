"""Round weights for a trial, without data and without a record: who calls this writes the dense weights back."""

from collections.abc import Sequence
from typing import Literal

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.matrix import as_matrix, write_matrix
from lightning_compress.quant.assignment import assign
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.schemes import GroupSize, from_presets
from lightning_compress.quant.weight_metrics import weight_error

__all__ = ["Assigned", "assigned", "round_in_place", "weight_scheme"]

Assigned = dict[str, QuantizationScheme]
"""The scheme of each module, by dotted name."""


def weight_scheme(name: str, targets: Sequence[str], group_size: GroupSize) -> QuantizationScheme:
    """The scheme of a preset; presets without groups of integers have no group size.

    Raises:
        ValueError: The preset is unknown, or quantizes inputs, too.
    """
    (scheme,) = from_presets(name, targets)
    if scheme.input_activations is not None:
        raise ValueError(
            f"schemes: {name!r} quantizes inputs, too, which a probe does not; take the weights alone, such as "
            f"W{scheme.weights.num_bits}A16"
        )
    has_groups = scheme.weights.type == "int" and scheme.weights.group_size
    return from_presets(name, targets, group_size)[0] if has_groups else scheme


def assigned(model: nn.Module, scheme: QuantizationScheme, ignore: Sequence[str]) -> Assigned:
    """The modules that get it; ValueError as in :func:`lightning_compress.quant.assignment.assign`."""
    return assign(model, [scheme], ignore, "shared")


def round_in_place(module: nn.Module, scheme: QuantizationScheme, scale_search: Literal["minmax", "mse"]) -> float:
    """Round the weight to nearest; its relative error, ||W - Q||^2 / ||W||^2."""
    W_RC = as_matrix(module)
    Q_RC = round_weight(W_RC, *find_scales(W_RC, scheme.weights, scale_search), scheme.weights)
    error = weight_error(W_RC, Q_RC)
    write_matrix(module, Q_RC)
    return error
