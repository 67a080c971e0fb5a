"""Mixtures of experts, whose fused tensors transformers splits when it saves and merges when it loads.

transformers is imported inside functions only. It uses one group of ``quantization_config`` as the scheme of all
experts, unpacks their weights with it, and merges them. What it can read was tried with toy models of five
architectures.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
)
from torch import Tensor, nn

from lightning_compress.export.quantization_config import matched
from lightning_compress.layers.split_experts import PROJECTIONS, fused_experts
from lightning_compress.quant.formats import has_global_scale, is_microscaled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["experts_first", "fault_of_experts", "installed", "names_of_experts", "planned_fault"]

Schemes = Mapping[str, QuantizationScheme]

FAILS = "fail to load this folder"
GARBAGE = "load this folder without an error, with random experts, and answer garbage"
EITHER = "fail to load this folder, or load it with random experts, without an error, and answer garbage"
READ = (
    "of the formats of experts it unpacks packed integers without zero points (W4A16, W8A16), FP8 by row or by tensor "
    "(FP8_DYNAMIC, FP8) and MXFP4 (MXFP4A16)"
)


def installed() -> str:
    """The version of transformers that is installed, for messages: what it can read changes from one to the next."""
    return f"transformers {version('transformers')}"


def names_of_experts(model: "PreTrainedModel") -> dict[str, str]:
    """The names on disk of the projections of experts that lie in one tensor, by their names in the split model.

    They are found by letting transformers split marked tensors [E, 2, 1] and [E, 1, 1]. Empty where it does not split
    them on the disk.
    """
    from transformers.core_model_loading import revert_weight_conversion

    marked: dict[str, Tensor] = {}
    owners: list[str] = []
    for name, module in fused_experts(model).items():
        experts = len(module.down_proj)  # type: ignore[arg-type]
        for fused, projections in {"gate_up_proj": PROJECTIONS[:2], "down_proj": PROJECTIONS[2:]}.items():
            first = len(owners)
            owners += [f"{name}.{expert}.{projection}" for expert in range(experts) for projection in projections]
            marks = torch.arange(first, len(owners), dtype=torch.float64, device="cpu")
            marked[f"{name}.{fused}"] = marks.reshape(experts, len(projections), 1)
    if not marked:
        return {}
    on_disk = revert_weight_conversion(model, marked)
    if any(mark.numel() != 1 for mark in on_disk.values()):
        return {}
    return {owners[int(mark)]: key.removesuffix(".weight") for key, mark in on_disk.items()}


def experts_first(model: "PreTrainedModel", config: QuantizationConfig, schemes: Schemes) -> None:
    """Put the group of the experts first, where transformers would use another group for them.

    It uses the first group whose targets, as patterns, name experts, else the first with another target, else the
    first.

    Groups keep their keys, and are reordered only where that helps and selects the same modules.
    """
    wanted = _of_experts(model, schemes)
    if wanted is None or _used(config) == wanted.weights or not _merges_weights(model):
        return
    groups, before = config.config_groups, matched(model, config)
    ordered = sorted(groups.values(), key=lambda group: group.weights != wanted.weights)  # a stable order
    config.config_groups = dict(zip(groups, ordered, strict=True))
    if _used(config) != wanted.weights or matched(model, config) != before:
        config.config_groups = groups


def planned_fault(model: nn.Module, schemes: Schemes) -> str:
    """What plain transformers will do wrong with an export of these schemes, in a sentence; empty where it reads it.

    The experts of the model have their children (layers/split_experts.py); ``schemes`` are of all modules to be
    quantized.
    """
    from transformers import PreTrainedModel

    if not schemes or not isinstance(model, PreTrainedModel):
        return ""
    outcome, fault = fault_of_experts(model, schemes)
    return fault and (
        f"{installed()} will not read what this run exports, but {outcome}: {fault}; lightning_compress.load reads it, "
        f"and servers such as vLLM have readers of their own"
    )


def fault_of_experts(
    model: "PreTrainedModel", schemes: Schemes, config: QuantizationConfig | None = None
) -> tuple[str, str]:
    """What goes wrong when transformers merges weights on loading, such as experts, and why; both empty: nothing.

    ``schemes`` are of all quantized modules; without ``config`` it is the one that :func:`experts_first` would make.
    """
    if not _merges_weights(model):
        return "", ""
    wanted = _of_experts(model, schemes)
    used = _used(config) if config is not None else None if wanted is None else wanted.weights
    experts = names_of_experts(model)
    if not experts.keys() & schemes.keys():
        if _is_eight_bit_float(used):  # weights without a scale then stay as they are
            return "", ""
        kind = type(model).__name__
        return EITHER if not experts else FAILS, (
            f"it takes the weights that it merges in a {kind}, such as experts, for quantized ones, unless others "
            f"are in FP8"
        )
    if not experts.keys() <= schemes.keys():
        return EITHER, "it takes all experts for quantized ones, and here some are dense"
    weights = [schemes[name].weights for name in experts]
    if any(other != weights[0] for other in weights) or weights[0] is None:
        return EITHER, "it unpacks all experts alike, and here they have several schemes"
    if used != weights[0]:
        return EITHER, "it takes another group of quantization_config for the scheme of the experts"
    if has_global_scale(weights[0]):
        return GARBAGE, READ
    return ("", "") if _is_read(schemes[next(iter(experts))], weights[0]) else (FAILS, READ)


def _is_read(scheme: QuantizationScheme, weights: QuantizationArgs) -> bool:
    if _is_eight_bit_float(weights):
        rows = weights.strategy in (QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR)
        return rows and not is_microscaled(weights)
    form = infer_module_format(nn.Linear, scheme)
    packed = form in (CompressionFormat.pack_quantized, CompressionFormat.mxfp4_pack_quantized)
    return packed and bool(weights.symmetric)


def _of_experts(model: "PreTrainedModel", schemes: Schemes) -> QuantizationScheme | None:
    """The scheme that transformers must use for the experts: theirs; where they are dense, one of 8-bit floats."""
    experts = [schemes[name] for name in names_of_experts(model) if name in schemes]
    return next(iter(experts or [scheme for scheme in schemes.values() if _is_eight_bit_float(scheme.weights)]), None)


def _is_eight_bit_float(weights: QuantizationArgs | None) -> bool:
    return weights is not None and weights.type == "float" and weights.num_bits == 8


def _used(config: QuantizationConfig) -> QuantizationArgs | None:
    """The scheme of weights that the installed transformers uses for the experts."""
    try:
        from transformers.integrations.compressed_tensors import get_experts_scheme
    except ImportError:
        groups: Any = list(config.config_groups.values())
        return groups[0].weights if groups else None
    weights: QuantizationArgs | None = get_experts_scheme(config).weights if config.config_groups else None
    return weights


def _merges_weights(model: "PreTrainedModel") -> bool:
    """True when transformers, on loading, builds some weights out of several on disk: experts of a mixture."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return False
    return any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model, add_legacy=False))
