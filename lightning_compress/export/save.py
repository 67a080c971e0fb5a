"""Save a compressed model: as ONNX (onnx/) or GGUF (gguf/), or as transformers and vLLM load it (compressed-tensors).

A folder of the latter holds

    model.safetensors          packed weights and their scales; all other tensors as they are (several files above 5 GB)
    config.json                the model's own (Hugging Face) plus ``quantization_config``
    generation_config.json     and the tokenizer's files, where there are such
    recipe.yaml                the recipe, where one was given
    export_manifest.json       the names of these files, and of the run that wrote them
    lightning_compress.json    only where needed: what compressed-tensors has no place for
    README.md                  the model card: what is compressed, sizes, metrics of the run, who can load it

Two kinds of quantized modules stay dense on disk, their weights on the grid: those whose packed form no loader reads
(convolutions, the Conv1D of GPT-2) and those that share their weight with another module. ``lightning_compress.json``
keeps their grids, so that ``load`` restores them; it reads

    {"format_version": 1,
     "dense": {module: {"scheme": {...}, "scale": TENSOR, "zero_point": TENSOR or null, "input_scale": ..., ...}},
     "names": {module: its name in model.safetensors, where transformers renames it},
     "dtype": the model's, where config.json had to name another one,
     "online": {module: rotations that run beside it}, see export/online.py,
     "structure": the cuts that made the model smaller, where no config of transformers states its sizes}
    TENSOR = {"dtype": "float32", "shape": [...], "values": [flat list of numbers]}

Files are written in a fixed order and hold no time: two saves of one model are equal byte for byte.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.compressors import ModelCompressor
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_compress.core.interruption import check_uninterrupted
from lightning_compress.export import hugging_face, plain_transformers
from lightning_compress.export.contents import Contents, check_weights, contents_of, warn_of_contents
from lightning_compress.export.experts import experts_first
from lightning_compress.export.formats import check_formats
from lightning_compress.export.gguf.write import write_gguf
from lightning_compress.export.model_card import write_card
from lightning_compress.export.online import online_entries, seal
from lightning_compress.export.onnx.write import write_onnx
from lightning_compress.export.own_file import FORMAT_VERSION, OWN_FILE
from lightning_compress.export.quantization_config import cache_only, quantization_config
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.export.state_on_disk import state_on_disk
from lightning_compress.export.tensors import TensorFiles, write_tensors
from lightning_compress.export.transform_config import check_readers, transform_config, transform_tensors
from lightning_compress.export.verify import answers
from lightning_compress.files.atomic_folder import whole_folder
from lightning_compress.layers.matching import without_parallel
from lightning_compress.quant.kv_cache import unread_caches
from lightning_compress.quant.packed import as_linears
from lightning_compress.quant.packing import check_fit, tensor_names
from lightning_compress.structure.surgery import record_of

__all__ = ["dump_yaml", "save", "saved_model", "write_compressed_tensors", "write_description"]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "compressed_tensors",
    sample: Any = None,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    verify: bool = False,
) -> Path:
    """Write a compressed model; the model does not change, and the folder appears complete or not at all.

    Needs memory for the packed weights beside the model, never for a second dense copy.

    Args:
        model: Any module. A Hugging Face model becomes a folder for ``from_pretrained``; any other gets the same
            safetensors and a config.json without ``model_type``. Where nothing is quantized (a model that was only
            pruned or distilled) the weights are written as they are, zeros included, and there is no
            ``quantization_config``: the sparse formats of compressed-tensors were removed in its version 0.20.
        folder: Folder to write; missing parents are created.
        format: ``compressed_tensors``, or ``onnx``: ``model.onnx`` with QuantizeLinear and DequantizeLinear, checked
            in ONNX Runtime; or ``gguf``: ``model.gguf`` for llama.cpp, of Llama and Qwen decoders (docs/export.md).
        sample: For ``onnx``: a batch of real inputs, as a tensor, a tuple of arguments or a dict of keyword arguments;
            by default the ``dummy_inputs`` of a model of transformers.
        tokenizer: Tokenizer or processor (anything with ``save_pretrained``) to save beside the model, or a list. For a
            multimodal model by default the processor of the local folder that it was loaded from.
        recipe: Written to recipe.yaml; numbers, strings, lists and dicts.
        overwrite: Replace an earlier export of that name; it stays as it is until the new one is on the disk. A folder
            that this function did not write, or that holds other files too, is never replaced.
        max_shard_bytes: Weights above this go into several files with an index; not for ``onnx``.
        verify: Let plain transformers, in another process, compute outputs for the ``dummy_inputs`` of the model from
            the folder (some 10 seconds); the folder stays when they differ from those of the model.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The model holds NaN, its compression was interrupted, the folder exists or cannot be written, the
            recipe is not plain data, the format cannot hold the model; or, with ``verify``, what is wrong with the
            folder.
        RuntimeError: A weight was changed after compression.
        OSError: Writing failed, such as for a full disk; nothing is left behind.
    """
    (format,) = check_formats("format", (format,))
    recipe_yaml = None if recipe is None else dump_yaml(recipe)
    if format == "onnx":
        if verify:
            raise ValueError("verify=True lets plain transformers load the folder; a file of ONNX is always checked")
        return write_onnx(
            saved_model(model),
            folder,
            sample=sample,
            processors=_as_list(tokenizer),
            recipe_yaml=recipe_yaml,
            overwrite=overwrite,
        ).folder
    if sample is not None:
        raise ValueError(f"sample is for format='onnx', and the format is {format!r}; leave it out")
    if format == "gguf":
        if verify:
            raise ValueError("verify=True lets plain transformers load the folder, which has no model.safetensors")
        processors = _as_list(tokenizer)
        return write_gguf(
            saved_model(model), folder, processors=processors, recipe_yaml=recipe_yaml, overwrite=overwrite
        )
    return write_compressed_tensors(
        model,
        folder,
        tokenizer=tokenizer,
        recipe=recipe,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        verify=verify,
    )


def saved_model(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of torch.compile and parallel training; ValueError where it cannot be saved."""
    model = without_parallel(getattr(model, "_orig_mod", model))  # torch.compile's wrapper
    check_uninterrupted(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "transformers quantized this model when it loaded it; load its folder with lightning_compress.load "
            "instead and save what that returns"
        )
    return model


def write_compressed_tensors(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    origin: Mapping[str, Any] | None = None,
    verify: bool = False,
    stored: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """:func:`save` in the format of compressed-tensors; other arguments than its own:

    Args:
        model: The model.
        folder: Folder to write.
        tokenizer: As of :func:`save`, like the four that follow.
        recipe: The same.
        overwrite: The same.
        max_shard_bytes: The same.
        verify: The same.
        origin: Written to export_manifest.json: ``run``, the name of the run, and other facts about where the model is
            from; the model card shows ``metric`` and ``gate``. An export that is replaced must be of the same run.
        stored: Packed tensors, by local name, of modules by their names: their weights are on the meta device.
    """
    model = saved_model(model)
    processors = _as_list(tokenizer) or hugging_face.source_processors(model)
    with as_linears(model) as packed:
        stored = {**packed, **(stored or {})}
        rehearse(model, processors)
        contents = contents_of(model, stored)
        check_readers(contents, verify)
        recipe_yaml = None if recipe is None else dump_yaml(recipe)
        try:
            with whole_folder(folder, overwrite=overwrite, origin=origin) as partial:
                check_weights(model, stored)
                for name in contents.dense:
                    check_fit(name, *contents.records[name])
                warn_of_contents(contents)
                fault = _write(contents, partial, max_shard_bytes)
                for processor in processors:
                    processor.save_pretrained(partial)
                if recipe_yaml is not None:
                    (partial / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
                write_card(
                    contents,
                    partial,
                    weight_bytes=TensorFiles(partial).nbytes,
                    fault=fault,
                    recipe_yaml=recipe_yaml,
                    origin=origin,
                    replaced=Path(folder).expanduser(),
                )
        except (OSError, SafetensorError) as error:
            raise OSError(f"writing {folder} failed and nothing of it is left: {error}; is the disk full?") from error
    path = Path(folder).expanduser().resolve()
    if verify and (fault := answers(model, path)[1]):
        raise ValueError(fault)
    return path


def _as_list(processors: Any) -> list[Any]:
    return [*processors] if isinstance(processors, list | tuple) else [] if processors is None else [processors]


def _write(contents: Contents, folder: Path, max_shard_bytes: int) -> str:
    """Weights and configs, in a folder that exists; returns what :func:`write_description` does."""
    on_disk = _write_weights(contents, folder, max_shard_bytes)
    return write_description(
        contents, folder, on_disk, {name: contents.records[name][1].to_json() for name in contents.dense}
    )


def write_description(contents: Contents, folder: Path, on_disk: Mapping[str, str], dense: Mapping[str, Any]) -> str:
    """``quantization_config`` in the config.json of a folder, and lightning_compress.json where it is needed.

    Weights may be on meta: only schemes are read.

    Args:
        contents: What the folder holds.
        folder: Folder with the config.json of the model.
        on_disk: Names of quantized modules on disk.
        dense: Records of the modules whose weight is dense on disk, as JSON.

    Returns:
        Why plain transformers cannot load the folder; empty where it can.
    """
    dtype, fault = _write_quantization(contents, folder) if contents.packed or contents.caches else (None, "")
    if contents.is_transformers:
        plain_transformers.warn_of_misfits(contents.model)
        plain_transformers.warn_of_dropped(contents.model)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dense": dict(dense),
        "names": {name: other for name, other in on_disk.items() if name != other},
    }
    if dtype is not None:
        content["dtype"] = str(dtype).removeprefix("torch.")
    if entries := online_entries(contents.model):
        content["online"] = entries
        seal(folder)
    if not contents.is_transformers and (steps := record_of(contents.model)):
        content["structure"] = steps
    if len(content) > 3 or content["dense"] or content["names"]:
        (folder / OWN_FILE).write_text(json.dumps(content, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return fault


def _write_weights(contents: Contents, folder: Path, max_shard_bytes: int) -> dict[str, str]:
    """All tensors, and config.json without quantization; returns the names of quantized modules on disk."""
    model, records, state = contents.model, contents.records, state_on_disk(contents)
    if contents.is_transformers:
        hugging_face.write(model, state | transform_tensors(model), folder, max_shard_bytes)
        on_disk = hugging_face.names_on_disk(model, list(records))
    else:
        (folder / "config.json").write_text("{}\n", encoding="utf-8")
        write_tensors(state, folder, max_shard_bytes)
        on_disk = {name: name for name in records}
    written = TensorFiles(folder)
    for name, (module, record) in contents.packed.items():
        written.check(on_disk[name], tensor_names(type(module), record.scheme))
    return on_disk


def _write_quantization(contents: Contents, folder: Path) -> tuple[torch.dtype | None, str]:
    """``quantization_config``; returns what :func:`plain_transformers.mend_layout` does."""
    model, packed = contents.model, contents.packed
    args = next((cache.args for cache in contents.caches.values()), None)
    config = quantization_config(model, packed) if packed or args is None else cache_only(args)
    config.kv_cache_scheme = args
    if contents.is_transformers:
        experts_first(model, config, {name: record.scheme for name, (_, record) in packed.items()})
        hugging_face.add_names_on_disk(model, config)
    transforms = transform_config(model)
    ModelCompressor(quantization_config=config, transform_config=transforms).update_config(str(folder))
    if not contents.is_transformers:
        return None, ""
    if contents.caches:
        plain_transformers.add_heads(model, folder)
        plain_transformers.warn_of_caches(unread_caches(model))
    return plain_transformers.mend_layout(model, config, packed, folder)


def dump_yaml(recipe: Mapping[str, Any]) -> str:
    """The text of recipe.yaml; ValueError where the recipe is not plain data."""
    try:
        return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe must hold plain numbers, strings, lists and dicts: {error}") from error
