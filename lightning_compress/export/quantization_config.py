"""``quantization_config``: the scheme of each quantized module, as compressed-tensors writes and loaders read it.

A group of modules is given by targets (class names, module names, patterns) minus one ignore list for all groups.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from compressed_tensors.compressors.format import infer_model_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import match_targets
from compressed_tensors.utils.match import is_match
from torch import nn

from lightning_compress.layers.matching import clean_name
from lightning_compress.quant.packing import is_packable
from lightning_compress.quant.record import Quantized

__all__ = ["cache_only", "matched", "quantization_config"]


def cache_only(args: QuantizationArgs) -> QuantizationConfig:
    """The config of a model whose weights are dense and whose KV cache is quantized."""
    dense, status = CompressionFormat.dense.value, QuantizationStatus.COMPRESSED
    return QuantizationConfig(config_groups={}, kv_cache_scheme=args, format=dense, quantization_status=status)


def quantization_config(model: nn.Module, packed: Mapping[str, tuple[nn.Module, Quantized]]) -> QuantizationConfig:
    """The config that compressed-tensors derives from the schemes, selecting exactly the packed modules.

    Where the targets of the recipe cannot select them (two techniques with one target and different ignore lists), the
    targets of a group become the names of its modules.
    """
    with _schemes_attached(model, packed) as schemes:
        config = QuantizationConfig.from_pretrained(model)
        config.format = infer_model_format(model)
    config.ignore = list(dict.fromkeys(clean_name(name) for name in config.ignore))
    config.ignore += [name for name in matched(model, config) if name not in packed]  # such as subclasses of Linear
    if not _selects(model, config, schemes):
        config.config_groups = _groups_by_name(schemes)
        assert _selects(model, config, schemes), "quantization_config does not select the modules that were quantized"
    return config


@contextmanager
def _schemes_attached(
    model: nn.Module, packed: Mapping[str, tuple[nn.Module, Quantized]]
) -> Iterator[dict[str, QuantizationScheme]]:
    """Inside, modules carry their scheme where compressed-tensors looks for it (a copy: it writes the format there)."""
    schemes = {name: record.scheme.model_copy(deep=True) for name, (_, record) in packed.items()}
    with ExitStack() as undo:
        for name, (module, _) in packed.items():
            module.quantization_scheme = schemes[name]
            undo.callback(delattr, module, "quantization_scheme")
            module.quantization_status = QuantizationStatus.COMPRESSED
            undo.callback(delattr, module, "quantization_status")
        if (renamings := vars(model).pop("_weight_conversions", None)) is not None:  # it would rename the ignore list
            undo.callback(setattr, model, "_weight_conversions", renamings)
        yield schemes


def _groups_by_name(schemes: Mapping[str, QuantizationScheme]) -> dict[str, QuantizationScheme]:
    """One group for each distinct scheme; its targets are the names of its modules."""
    groups: list[QuantizationScheme] = []
    for name, scheme in schemes.items():
        if (group := next((g for g in groups if _acts_as(g) == _acts_as(scheme)), None)) is not None:
            group.targets.append(name)
        else:
            groups.append(scheme.model_copy(update={"targets": [name]}))
    return {f"group_{number}": group for number, group in enumerate(groups)}


def matched(model: nn.Module, config: QuantizationConfig) -> dict[str, QuantizationScheme]:
    """The scheme that loaders give to each module."""
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    selected = {}
    for name, module in model.named_modules():
        name = clean_name(name)
        if is_packable(module) and is_match(name, module, schemes, config.ignore or []):
            selected[name] = schemes[match_targets(name, module, schemes)[0]]
    return selected


def _selects(model: nn.Module, config: QuantizationConfig, schemes: Mapping[str, QuantizationScheme]) -> bool:
    selected = matched(model, config)
    return selected.keys() == schemes.keys() and all(_acts_as(selected[n]) == _acts_as(schemes[n]) for n in schemes)


def _acts_as(scheme: QuantizationScheme) -> dict[str, Any]:
    return scheme.model_dump(exclude={"targets"})
