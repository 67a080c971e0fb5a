"""What is particular to the models of transformers: how it saves, renames, ties, lays out and loads weights.

transformers is imported inside functions only.
"""

import copy
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from torch import Tensor, nn

from lightning_compress.export.experts import fault_of_experts, installed, names_of_experts
from lightning_compress.export.tensors import TensorFiles, naming, read_json
from lightning_compress.layers.matching import clean_name
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.packing import tensor_names
from lightning_compress.quant.record import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "add_heads",
    "add_names_on_disk",
    "build",
    "example_of",
    "is_transformers",
    "mend_layout",
    "names_on_disk",
    "skeleton",
    "warn_of_caches",
    "warn_of_dropped",
    "warn_of_misfits",
    "write",
    "write_configs",
]

PACKED = CompressionFormat.pack_quantized
COUNTS = re.compile(r"(layers?|blocks|experts|depths?|labels)$")  # keys of a config whose numbers become modules
COMPUTED = re.compile(r"(inv_freq|(attn|attention)\.(masked_)?bias|position_index|num_batches_tracked|version)$")
BUFFERS = 2**28  # numbers in the buffers of a model that its files need not account for


def is_transformers(model: nn.Module) -> bool:
    """True for a model of transformers."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def write(model: "PreTrainedModel", state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """``save_pretrained`` with another state dict: weights under their names on disk, config, generation config."""
    config = model.config
    before = {key: getattr(config, key, None) for key in ("dtype", "architectures")}  # save_pretrained sets them
    try:
        type(model).save_pretrained(model, folder, state_dict=state, max_shard_size=max_shard_bytes)
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    if getattr(config, "tie_word_embeddings", False) and not _is_tied(model):
        _change(folder / "config.json", tie_word_embeddings=False)


def write_configs(model: "PreTrainedModel", folder: str | Path) -> None:
    """``save_pretrained`` without weights and without its progress bar."""
    from transformers.utils import logging

    config = model.config
    before = {key: getattr(config, key, None) for key in ("dtype", "architectures")}  # save_pretrained sets them
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        type(model).save_pretrained(model, folder, state_dict={})
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        if shown:
            logging.enable_progress_bar()


def _is_tied(model: "PreTrainedModel") -> bool:
    """False when the model's embeddings are two tensors, whatever its config promises."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # models of several parts, such as CLIP
        return True
    return inputs is None or outputs is None or inputs.weight is outputs.weight


def names_on_disk(model: "PreTrainedModel", names: Sequence[str]) -> dict[str, str]:
    """The names that ``save_pretrained`` gives to modules: transformers 5 renames some on their way to the disk."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {name: name for name in names}
    fused = names_of_experts(model)
    names = [name for name in names if name not in fused]
    marked = {f"{name}.weight": torch.tensor(place, dtype=torch.int64) for place, name in enumerate(names)}
    renamed = revert_weight_conversion(model, marked)
    return {names[int(mark)]: key.removesuffix(".weight") for key, mark in renamed.items()} | fused


def add_names_on_disk(model: "PreTrainedModel", config: QuantizationConfig) -> None:
    """Ignored modules under both their names: transformers matches the model's own, vLLM those on disk."""
    on_disk = names_on_disk(model, config.ignore)
    config.ignore = list(dict.fromkeys([*config.ignore, *(on_disk[name] for name in config.ignore)]))


def add_heads(model: "PreTrainedModel", folder: Path) -> None:
    """Say how many heads keys have, where only that of queries stands in config.json: loaders of a KV cache ask for it.

    Models without the one number, such as OPT, have as many of both; they do not read what is written.
    """
    text = model.config.get_text_config(decoder=True)
    if text is model.config and not hasattr(text, "num_key_value_heads"):
        _change(folder / "config.json", num_key_value_heads=text.num_attention_heads)


def warn_of_caches(unread: Sequence[str]) -> None:
    """Warn of attention modules whose cache the installed loader leaves as it is, without a word."""
    if unread:
        warnings.warn(
            f"{installed()} with compressed-tensors {version('compressed-tensors')} will load this folder and leave "
            f"its KV cache as it is, without a word, so that its outputs differ from this model's: compressed-tensors "
            f"does not find the cache of {', '.join(unread[:3])}, whose keyword transformers 5.24 renamed from "
            f"past_key_values to cache; load it with transformers below 5.24, or with lightning_compress.load",
            stacklevel=4,
        )


def mend_layout(
    model: "PreTrainedModel",
    config: QuantizationConfig,
    packed: Mapping[str, tuple[nn.Module, Quantized]],
    folder: Path,
) -> torch.dtype | None:
    """Make ``from_pretrained`` unpack the weights while it reads them, where it cannot lay the model out packed.

    It first gives the model packed parameters, then reads the file into them, and unpacks them at the first call.
    Where that fails (see :func:`_layout_fault`), or gives weights of another dtype than the model's (NVFP4 and the MX
    formats unpack to bfloat16), the key ``dequantize`` in quantization_config takes another way, that knows one
    scheme for the whole model and no activations. vLLM does not read that key. Where that way is closed the dtype in
    config.json becomes bfloat16; what neither way loads gets a warning.

    Returns:
        The dtype of the model when config.json names another one.
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
            stacklevel=4,
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
            _change(path, quantization_config=read_json(path)["quantization_config"] | {"dequantize": True})
            return None
    if fault:
        warnings.warn(f"{installed()} will {outcome}: {fault}; {advice}", stacklevel=4)
    if not bfloat16:
        return None
    _change(folder / "config.json", dtype="bfloat16")
    warnings.warn(
        f"config.json says dtype bfloat16, not {model.dtype}: compressed-tensors 0.20 unpacks NVFP4 and the MX formats "
        f"to bfloat16, and a model of another dtype would fail at its first call; lightning_compress.load keeps "
        f"{model.dtype}",
        stacklevel=4,
    )
    dtype: torch.dtype = model.dtype
    return dtype


def _layout_fault(
    model: "PreTrainedModel", config: QuantizationConfig, packed: Mapping[str, tuple[nn.Module, Quantized]]
) -> str:
    """Why transformers cannot lay this model out with packed weights; empty when it can."""
    for group in config.config_groups.values():
        grouped = group.weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        if grouped and not group.weights.symmetric and group.format == CompressionFormat.pack_quantized:
            return "compressed-tensors 0.20 lays zero points out unpacked, and packed ones are refused for their shape"
    with torch.device("meta"):
        layout = type(model)(copy.deepcopy(model.config))
    there = dict(layout.named_modules())  # not the projections of experts, nor what was added to this one model
    for name, (module, record) in packed.items():
        if name in there and "weight" not in tensor_names(type(module), record.scheme):
            del there[name].weight
    try:
        layout.initialize_weights()
    except AttributeError as error:  # T5: it reaches for the weights of its attention's Linears
        return f"{type(model).__name__} cannot be initialized with packed weights: {error}"
    return ""


def warn_of_dropped(model: "PreTrainedModel") -> None:
    """Name the weights of the source folder that this class does not load, such as layers that predict more tokens.

    transformers passes over them without a word where the class lists them in ``_keys_to_ignore_on_load_unexpected``;
    the export cannot hold what was never loaded. Buffers that the class computes anew are not named.
    """
    source = getattr(model.config, "_name_or_path", "")
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if not patterns or not source or not (folder := Path(source)).is_dir():
        return
    try:
        names = TensorFiles(folder).names
    except (OSError, ValueError):  # no safetensors there, or no longer whole: not what is being saved
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
            stacklevel=5,
        )


def warn_of_misfits(model: "PreTrainedModel") -> None:
    """Warn of weights that are not those that the class has by config.json: their sizes, and which there are."""
    with torch.device("meta"):
        promised = type(model)(_dense_config(model.config)).state_dict()
    own = {clean_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} {tuple(own[name])}, by the config {tuple(tensor.shape)}"
        for name, tensor in promised.items()
        if name in own and own[name] != tensor.shape
    ]
    if wrong:
        warnings.warn(
            f"transformers will fail to load this folder: {len(wrong)} weights do not have the sizes that the model's "
            f"config promises ({'; '.join(wrong[:3])}); set the config's sizes to those of the model before save, or "
            f"build the model as it is and call lightning_compress.load(folder, model)",
            stacklevel=4,
        )
    kind = type(model).__name__
    _warn_of_names(own.keys() - promised.keys(), f"pass over what a {kind} does not have by its config")
    _warn_of_names(promised.keys() - own.keys(), f"initialize anew what this {kind} lacks")


def _warn_of_names(names: Collection[str], outcome: str) -> None:
    if names:
        warnings.warn(
            f"transformers will load this folder without an error, and {outcome}: {', '.join(sorted(names)[:5])} "
            f"({len(names)} tensors), so that its answers may differ; build the model as it is and call "
            f"lightning_compress.load(folder, model), or let its config say so before save",
            stacklevel=5,
        )


def skeleton(
    folder: Path, config: Mapping[str, Any], tensors: int, dtype: torch.dtype | None = None
) -> "PreTrainedModel":
    """The model that config.json describes, without weights.

    Args:
        folder: With the config.json.
        config: Its content.
        tensors: How many there are in the folder: no config may describe more layers.
        dtype: In place of the one there.
    """
    import transformers

    path = folder / "config.json"
    named = config.get("architectures") or [""]
    architecture = named[0] if isinstance(named, list) else named
    model_class = getattr(transformers, architecture, None) if architecture and isinstance(architecture, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"transformers has no model {architecture!r}, which {path} names; "
            f"build the dense model and call load(folder, model)"
        )
    _check_counts(path, config, tensors)
    with torch.device("meta"):
        with naming(path):
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        expected = model_class.config_class  # type: ignore[attr-defined]
        if expected is not None and not isinstance(settings, expected):
            raise ValueError(
                f"{path}: model_type {config.get('model_type')!r} does not belong to the architecture {architecture!r}"
            )
        settings.dtype = settings.dtype if dtype is None else dtype
        with naming(path):
            model: PreTrainedModel = model_class(_dense_config(settings))
    return model


def _check_counts(path: Path, tree: Any, tensors: int) -> None:
    """ValueError names the key that promises far more layers, experts or labels than the files have tensors."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        _check_counts(path, value, tensors)
        if COUNTS.search(str(key)):
            limit = max(1024, tensors) if not str(key).endswith("labels") else 10**6
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > limit:
                    raise ValueError(
                        f"{path}: {key} is {count!s:.30}, and the files beside it hold {tensors:,} tensors; copy the "
                        f"folder anew"
                    )


def _check_sizes(path: Path, layout: "PreTrainedModel", weights: Mapping[str, Tensor]) -> None:
    """ValueError before memory is asked for that nothing in the files fills.

    A tied weight may be counted twice; buffers such as masks and tables of positions are made anew.
    """
    stored = sum(tensor.numel() for tensor in weights.values())
    needed = sum(parameter.numel() for parameter in layout.parameters())
    buffers = sum(buffer.numel() for buffer in layout.buffers())
    if needed > 2 * stored or buffers > 2 * stored + BUFFERS:
        raise ValueError(
            f"{path} describes a model of {needed:,} weights and {buffers:,} numbers in buffers, and the files beside "
            f"it hold {stored:,}; copy the folder anew"
        )


def build(
    folder: Path, layout: "PreTrainedModel", weights: Mapping[str, Tensor], extra: Collection[str] = ()
) -> "PreTrainedModel":
    """Let transformers load dense ``weights``, under their names on disk, into a new model like ``layout``.

    Args:
        folder: Where they are from.
        layout: A model of that class and config.
        weights: All of them.
        extra: Names that the class may lack: what was added to the model that is filled.
    """
    from transformers import GenerationConfig

    _check_sizes(folder / "config.json", layout, weights)
    with naming(folder / "config.json"):
        model, info = type(layout).from_pretrained(
            None, config=_dense_config(layout.config), state_dict=dict(weights), output_loading_info=True
        )
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if name not in extra]
    if bad := {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}:
        raise ValueError(
            f"{folder} does not fit {type(layout).__name__}: {bad}; where something was added to the model before "
            f"it was saved, add it to a dense one too and call load(folder, model)"
        )
    if model.can_generate() and (folder / "generation_config.json").exists():
        with naming(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def example_of(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Inputs that the model can be called with, on its device."""
    return {name: value.to(model.device) for name, value in model.dummy_inputs.items()}


def _dense_config(config: Any) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _change(path: Path, **values: Any) -> None:
    text = json.dumps(read_json(path) | values, indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")
