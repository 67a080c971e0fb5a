"""How plain transformers reads an exported folder: configs are changed so that it can, or a warning says what fails.

transformers is imported inside functions only.
"""

import copy
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from torch import nn

from lightning_compress.export.experts import fault_of_experts, installed, names_of_experts
from lightning_compress.export.hugging_face import change_json, dense_config
from lightning_compress.export.tensors import TensorFiles, read_json
from lightning_compress.layers.matching import clean_name
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.packing import tensor_names
from lightning_compress.quant.record import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add_heads", "mend_layout", "warn_of_caches", "warn_of_dropped", "warn_of_misfits"]

COMPUTED = re.compile(r"(inv_freq|(attn|attention)\.(masked_)?bias|position_index|num_batches_tracked|version)$")


def mend_layout(
    model: "PreTrainedModel",
    config: QuantizationConfig,
    packed: Mapping[str, tuple[nn.Module, Quantized]],
    folder: Path,
) -> tuple[torch.dtype | None, str]:
    """Make ``from_pretrained`` unpack the weights while it reads them, where it cannot hold the model packed.

    By default it gives the model packed parameters, reads the file into them, and unpacks them at the first call. Where
    that fails (see :func:`_layout_fault`), or gives weights of another dtype than that of the model (NVFP4 and the MX
    formats unpack to bfloat16), the key ``dequantize`` in quantization_config makes it unpack while it reads, which
    works with one scheme for the whole model and without activations. vLLM does not read that key. Where the key does
    not help, the dtype in config.json becomes bfloat16, or a warning says what cannot be loaded.

    Returns:
        The dtype of the model when config.json names another one, and why transformers cannot load the folder; empty
        where it can.
    """
    groups = list(config.config_groups.values())
    several = len(groups) != 1 or groups[0].input_activations is not None or config.kv_cache_scheme is not None
    bfloat16 = model.dtype != torch.bfloat16 and any(is_microscaled(group.weights) for group in groups)
    advice = "the folder is as it should be, and lightning_compress.load reads it"
    schemes = {name: record.scheme for name, (_, record) in packed.items()}
    experts = [schemes[name] for name in names_of_experts(model) if name in schemes]
    if active := [scheme for scheme in experts if scheme.input_activations is not None]:
        warnings.warn(
            f"{installed()} will not quantize the inputs of {len(active)} projections of experts, so that "
            f"its outputs differ from this model's; lightning_compress.load restores them",
            stacklevel=5,
        )
    outcome, fault = fault_of_experts(model, schemes, config)
    if fault:
        advice += "; save(..., verify=True) tries it"
    else:
        outcome, fault = "fail to load this folder", _layout_fault(model, config, packed)
        if fault and several:
            advice += "; with one scheme for the whole model, and no activations, transformers does too"
        elif fault or (bfloat16 and not several):
            path = folder / "config.json"
            change_json(path, quantization_config=read_json(path)["quantization_config"] | {"dequantize": True})
            return None, ""
    if fault:
        fault = f"{installed()} will {outcome}: {fault}"
        warnings.warn(f"{fault}; {advice}", stacklevel=5)
    if not bfloat16:
        return None, fault
    change_json(folder / "config.json", dtype="bfloat16")
    warnings.warn(
        f"config.json says dtype bfloat16, not {model.dtype}: compressed-tensors 0.20 unpacks NVFP4 and the MX formats "
        f"to bfloat16, and a model of another dtype would fail at its first call; lightning_compress.load keeps "
        f"{model.dtype}",
        stacklevel=5,
    )
    dtype: torch.dtype = model.dtype
    return dtype, fault


def _layout_fault(
    model: "PreTrainedModel", config: QuantizationConfig, packed: Mapping[str, tuple[nn.Module, Quantized]]
) -> str:
    """Why transformers cannot build this model with packed weights; empty when it can."""
    for group in config.config_groups.values():
        grouped = group.weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        if grouped and not group.weights.symmetric and group.format == CompressionFormat.pack_quantized:
            return "compressed-tensors 0.20 expects unpacked zero points, and refuses packed ones for their shape"
    with torch.device("meta"):
        layout = type(model)(copy.deepcopy(model.config))
    modules = dict(layout.named_modules())  # not the projections of experts, nor modules added to this model
    for name, (module, record) in packed.items():
        if name in modules and "weight" not in tensor_names(type(module), record.scheme):
            del modules[name].weight
    try:
        layout.initialize_weights()
    except AttributeError as error:  # T5 initializes the weights of the Linears of its attention
        return f"{type(model).__name__} cannot be initialized with packed weights: {error}"
    return ""


def add_heads(model: "PreTrainedModel", folder: Path) -> None:
    """Write the number of key heads where config.json has only that of queries: loaders of a KV cache read it.

    Models without it, such as OPT, have as many key heads as query heads, and do not read it themselves.
    """
    text = model.config.get_text_config(decoder=True)
    if text is model.config and not hasattr(text, "num_key_value_heads"):
        change_json(folder / "config.json", num_key_value_heads=text.num_attention_heads)


def warn_of_caches(unread: Sequence[str]) -> None:
    """Warn of attention modules whose cache the installed loader silently does not quantize."""
    if unread:
        warnings.warn(
            f"{installed()} with compressed-tensors {version('compressed-tensors')} will load this folder without "
            f"a warning and not quantize its KV cache, so that its outputs differ from this model's: "
            f"compressed-tensors does not find the cache of {', '.join(unread[:3])}, whose keyword transformers 5.24 "
            f"renamed from past_key_values to cache; load it with transformers below 5.24, or with "
            f"lightning_compress.load",
            stacklevel=5,
        )


def warn_of_dropped(model: "PreTrainedModel") -> None:
    """Name the weights of the source folder that this class does not load, such as layers that predict more tokens.

    transformers skips them without a warning where the class lists them in ``_keys_to_ignore_on_load_unexpected``, so
    that the export cannot hold them. Buffers that the class computes are not named.
    """
    source = getattr(model.config, "_name_or_path", "")
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if not patterns or not source or not (folder := Path(source)).is_dir():
        return
    try:
        names = TensorFiles(folder).names
    except (OSError, ValueError):  # no safetensors there, or damaged ones: this is not the folder that is saved
        return
    dropped = [
        name
        for name in sorted(names)
        if any(re.search(pattern, name) for pattern in patterns) and not COMPUTED.search(name)
    ]
    if dropped:
        warnings.warn(
            f"{folder} holds {len(dropped)} tensors that {type(model).__name__} does not load, such as {dropped[0]}; "
            f"the export lacks them: a server that uses them (multi-token prediction) needs those of the dense model",
            stacklevel=4,
        )


def warn_of_misfits(model: "PreTrainedModel") -> None:
    """Warn of weights that are not those that the class has by config.json: their sizes, and which there are."""
    with torch.device("meta"):
        promised = type(model)(dense_config(model.config)).state_dict()
    shapes = {clean_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} {tuple(shapes[name])}, by the config {tuple(tensor.shape)}"
        for name, tensor in promised.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    if wrong:
        warnings.warn(
            f"transformers will fail to load this folder: {len(wrong)} weights do not have the sizes that the model's "
            f"config promises ({'; '.join(wrong[:3])}); set the config's sizes to those of the model before save, or "
            f"build the model as it is and call lightning_compress.load(folder, model)",
            stacklevel=4,
        )
    kind = type(model).__name__
    _warn_of_names(shapes.keys() - promised.keys(), f"skip what a {kind} does not have by its config")
    _warn_of_names(promised.keys() - shapes.keys(), f"initialize anew what this {kind} lacks")


def _warn_of_names(names: Collection[str], outcome: str) -> None:
    if names:
        warnings.warn(
            f"transformers will load this folder without an error, and {outcome}: {', '.join(sorted(names)[:5])} "
            f"({len(names)} tensors), so that its answers may differ; build the model as it is and call "
            f"lightning_compress.load(folder, model), or let its config say so before save",
            stacklevel=5,
        )
