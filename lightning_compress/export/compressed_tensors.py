"""Save a compressed model as transformers and vLLM load it (compressed-tensors), and load it back.

A folder holds

    model.safetensors          packed weights and their scales; all other tensors as they are (several files above 5 GB)
    config.json                the model's own (Hugging Face) plus ``quantization_config``
    generation_config.json     and the tokenizer's files, where there are such
    recipe.yaml                the recipe, where one was given
    export_manifest.json       the names of these files, and of the run that wrote them
    lightning_compress.json    only where needed: what compressed-tensors has no place for

Two kinds of quantized modules stay dense on disk, their weights on the grid: those whose packed form no loader reads
(convolutions, the Conv1D of GPT-2) and those that share their weight with another module. ``lightning_compress.json``
keeps their grids, so that :func:`load` restores them; it reads

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
import logging
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_compress.core.interruption import check_uninterrupted
from lightning_compress.export import hugging_face
from lightning_compress.export.embeddings import unpackable_embeddings, unpacked
from lightning_compress.export.experts import experts_first, names_of_experts
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.export.online import attach_all, check_all, online_entries, seal, unsealed
from lightning_compress.export.own_file import FORMAT_VERSION, read_own
from lightning_compress.export.quantization_config import cache_only, matched, quantization_config
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.export.tensors import TensorFiles, naming, read_json, write_tensors
from lightning_compress.export.verify import answers
from lightning_compress.files.atomic_folder import whole_folder
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import clean_name, without_parallel
from lightning_compress.layers.matrix import as_matrix, weight_of
from lightning_compress.layers.split_experts import fused_experts, join, split
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules, unread_caches
from lightning_compress.quant.packed import PackedLinear, Packing, as_linears, fuse_siblings, pack_linears
from lightning_compress.quant.packing import (
    check_fit,
    check_record,
    is_packable,
    pack,
    tensor_names,
    unpack,
)
from lightning_compress.quant.record import Quantized, saw_rows
from lightning_compress.structure.surgery import record_of, reshape

__all__ = ["load", "save"]

log = logging.getLogger(__name__)

OWN_FILE = "lightning_compress.json"
Records = Mapping[str, tuple[nn.Module, Quantized]]
Stored = Mapping[str, Mapping[str, Tensor]]  # of modules that are packed in memory: their tensors on disk


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    origin: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Path:
    """Write a compressed model; the model stays as it is, and what is written appears whole or not at all.

    Needs memory for the packed weights beside the model, never for a second dense copy.

    Args:
        model: Any module. A Hugging Face model becomes a folder for ``from_pretrained``; any other gets the same
            safetensors and a config.json without ``model_type``. Where nothing is quantized (a model that was only
            pruned or distilled) the weights are written as they are, zeros included, and there is no
            ``quantization_config``: the sparse formats of compressed-tensors are gone from its version 0.20.
        folder: Where to; made together with missing parents.
        tokenizer: Tokenizer or processor (anything with ``save_pretrained``) to lie beside the model, or a list.
        recipe: Written to recipe.yaml; numbers, strings, lists and dicts.
        overwrite: Replace an earlier export of that name; it stays as it is until the new one is on the disk. A folder
            that this function did not write, or that holds other files too, is never replaced.
        max_shard_bytes: Weights above this go into several files with an index.
        origin: Kept in export_manifest.json: ``run``, the name of the run, and whatever else says where the model is
            from. What is replaced must be of the same run.
        verify: Let plain transformers, in a process of its own, answer the model's ``dummy_inputs`` from the folder
            (some 10 seconds); the folder stays when its answers are not the model's.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The model holds NaN, its compression was interrupted, the folder exists or cannot be written, the
            recipe is not plain data; or, with ``verify``, what is wrong with the folder.
        RuntimeError: A weight was changed after compression.
        OSError: Writing failed, such as for a full disk; nothing is left behind.
    """
    model = without_parallel(getattr(model, "_orig_mod", model))  # torch.compile's wrapper
    check_uninterrupted(model)
    listed = tokenizer if isinstance(tokenizer, list | tuple) else [] if tokenizer is None else [tokenizer]
    with as_linears(model) as stored:
        _save(model, stored, folder, listed, recipe, overwrite, max_shard_bytes, origin)
    path = Path(folder).expanduser().resolve()
    if verify and (fault := answers(model, path)[1]):
        raise ValueError(fault)
    return path


def _save(
    model: nn.Module,
    stored: Stored,
    folder: str | Path,
    processors: Sequence[Any],
    recipe: Mapping[str, Any] | None,
    overwrite: bool,
    max_shard_bytes: int,
    origin: Mapping[str, Any] | None,
) -> None:
    records: Records = {clean_name(name): pair for name, pair in Quantized.find(model).items()}
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "transformers quantized this model when it loaded it; load its folder with lightning_compress.load instead "
            "and save what that returns"
        )
    rehearse(model, processors)
    caches = _caches(model)
    recipe_yaml = None if recipe is None else _yaml(recipe)
    reasons = _dense_on_disk(model, records)
    if hugging_face.is_transformers(model):
        packed = {name: pair for name, pair in records.items() if name not in reasons}
        odd = unpackable_embeddings(packed, bool(caches))
        reasons |= {name: reason for name, reason in odd.items() if reason is not None}
        bytewise = odd.keys() - reasons.keys()
        records = {n: (module, unpacked(r) if n in bytewise else r) for n, (module, r) in records.items()}
    try:
        with whole_folder(folder, overwrite=overwrite, origin=origin) as partial:
            _check_weights(model, stored)
            for name in reasons:
                check_fit(name, *records[name])
            _warn_dense(reasons, records)
            _warn_rows(model, {name: pair for name, pair in records.items() if name not in reasons})
            _write(model, records, caches, stored, set(reasons), partial, max_shard_bytes)
            for processor in processors:
                processor.save_pretrained(partial)
            if recipe_yaml is not None:
                (partial / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(f"writing {folder} failed and nothing of it is left: {error}; is the disk full?") from error


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    *,
    packed: bool | None = None,
    fuse: bool | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read what :func:`save` wrote: a model that computes on packed weights where that is as quick as dense ones.

    Args:
        folder: The folder.
        model: A freshly built dense model to fill, of the dtype that was saved. Needed for all but Hugging Face's
            models; those are built from config.json when it is left out.
        device: Where the model goes; by default it stays on its device (the CPU when it is built here).
        packed: Which quantized Linears compute on packed weights (``quant.packed``). None: those for which the device
            has a way of its own that is at least as quick as a dense Linear for few tokens. True: all of them. False:
            none; every weight is dequantized and carries the record that makes it quantized, for further training.
        fuse: Let packed Linears that multiply the same tensor (q/k/v, gate/up) make one product; the model is called
            once to find them, which only models of transformers can be (others: ``quant.packed.fuse_siblings``).
            None: where that is possible.
        dtype: That of the Hugging Face model that is built, and of its scales; by default the one that was saved. In
            bfloat16 a CPU has packed products for weights of 4 and 8 bits that float32 lacks.

    Returns:
        ``model``, or the new one, in evaluation mode. Inputs are quantized where the scheme says so.

    Raises:
        ValueError: The folder holds no such export, it does not fit ``model``, transformers quantized it in another
            way, nothing in it can be ``packed``, or nothing can be fused with ``fuse=True``.
    """
    folder = Path(folder).expanduser().resolve()
    config_file, own_file = folder / "config.json", folder / OWN_FILE
    config, own = read_json(config_file), read_own(own_file)
    if "online" in own:
        if packed or fuse:
            raise ValueError(f"{folder}: rotations run beside its modules, which packed ones do not; leave packed out")
        packed = False
        with naming(config_file):
            config = unsealed(config)
    quantization = _quantization_of(config_file, config)
    if model is None and "model_type" not in config:
        raise ValueError(f"{folder} holds no Hugging Face model; build the dense model and call load(folder, model)")

    if dtype is not None and (model is not None or not dtype.is_floating_point):
        raise ValueError(
            f"dtype={dtype} is for a model of transformers that is built here, and floating; hand in a model of that "
            f"dtype instead, or leave dtype out"
        )

    files = TensorFiles(folder)
    built_as = dtype or (getattr(torch, own["dtype"]) if "dtype" in own else None)
    layout = model if model is not None else hugging_face.skeleton(folder, config, len(files.names), built_as)
    with naming(own_file, "structure"):
        reshape(layout, own.get("structure", record_of(layout)))
    names = dict(own["names"])
    if hugging_face.is_transformers(layout) and fused_experts(layout):
        split(layout)
        names = names_of_experts(layout) | names
    weights, records, stored = {}, {}, {}
    if quantization:
        with naming(config_file, "quantization_config"):
            schemes = matched(layout, QuantizationConfig.model_validate(quantization))
        for name, scheme in schemes.items():
            on_disk = names.get(name, name)
            module = layout.get_submodule(name)
            if isinstance(module, ExpertLinear) and f"{on_disk}.weight_scale" not in files.names:
                continue  # a target by class, but these experts stayed dense
            with naming(files.path_of(f"{on_disk}.weight_scale"), repr(name)):
                tensors = _scales_as(dtype, files.take(on_disk, tensor_names(type(module), scheme)), scheme)
                weight, records[name] = _unpacked(name, tensors, module, scheme)
            if packed is not False:
                stored[name] = dict(tensors)
            weights[f"{on_disk}.weight"] = weight
    with naming(config_file, "kv_cache_scheme"):
        caches = _read_caches(layout, quantization.get("kv_cache_scheme"), files)
    for name, data in own["dense"].items():
        with naming(own_file, f"dense.{name}"):
            records[name] = Quantized.from_json(data)
            check_record(name, as_matrix(layout.get_submodule(name)), records[name])
    check_all(layout, own.get("online", {}), own_file)
    weights |= files.rest()

    if not hugging_face.is_transformers(layout):
        _check_finite(folder, nonfinite(layout, weights))
        model = _fill(folder, layout, weights)
    else:
        own_names = set() if model is None else {*model.state_dict()} & {*weights}
        built = hugging_face.build(folder, layout, weights, own_names)
        if model is None:
            _check_finite(folder, nonfinite(built))
            model = built
        else:
            state = built.state_dict()
            added = {name: weights[name] for name in own_names - state.keys()}  # a buffer or head that it was given
            _check_finite(folder, nonfinite(model, state | added))
            model.load_state_dict(state | added)
    model = (model if device is None else model.to(device)).eval()
    attach_all(model, own.get("online", {}))
    if any(isinstance(layout.get_submodule(name), ExpertLinear) for name in records):
        split(model)
    for name, record in records.items():
        module = model.get_submodule(name)
        record.to(weight_of(module).device).attach(module)
    join(model)
    for name, cache in caches.items():
        attention = model.get_submodule(name)
        cache.to(next(attention.parameters()).device).attach(attention)
    if packed is not False:
        with naming(folder):
            packing = pack_linears(model, stored, served=packed is None)
        _say(packing, advise=packed is None and model is not layout)
        if packed and not packing.names:
            raise ValueError(f"{folder} holds no quantized Linear with a weight of its own; leave packed out")
    if fuse is not False:
        _fuse(model, folder, bool(fuse))
    guard_save_pretrained(model)
    return model


# -- saving -----------------------------------------------------------------------------------------------------------


def _caches(model: nn.Module) -> dict[str, QuantizedCache]:
    """Records of the KV cache, by attention module; ValueError where loaders would quantize more than these."""
    caches = {clean_name(name): record for name, (_, record) in QuantizedCache.find(model).items()}
    if caches and (missing := [name for name in attention_modules(model) if name not in caches]):
        raise ValueError(
            f"the KV cache of {len(caches)} attention modules is quantized, that of {', '.join(missing[:5])} is not, "
            f"and a folder can only say it of all; calibrate on data that reaches every one of them"
        )
    return caches


def _write(
    model: nn.Module,
    records: Records,
    caches: Mapping[str, QuantizedCache],
    stored: Stored,
    dense: set[str],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Weights and configs, in a folder that is there."""
    packed = {name: pair for name, pair in records.items() if name not in dense}
    state = _state_on_disk(model, packed, stored)
    for name, cache in caches.items():
        for local in QuantizedCache.tensor_names(cache.args):
            state[f"{name}.{local}"] = getattr(cache, local).detach().cpu()
    if is_transformers := hugging_face.is_transformers(model):
        hugging_face.write(model, state, folder, max_shard_bytes)
        on_disk = hugging_face.names_on_disk(model, list(records))
    else:
        (folder / "config.json").write_text("{}\n", encoding="utf-8")
        write_tensors(state, folder, max_shard_bytes)
        on_disk = {name: name for name in records}
    written = TensorFiles(folder)
    for name, (module, record) in packed.items():
        written.check(on_disk[name], tensor_names(type(module), record.scheme))
    dtype = None
    if packed or caches:
        args = next((cache.args for cache in caches.values()), None)
        config = quantization_config(model, packed) if packed or args is None else cache_only(args)
        config.kv_cache_scheme = args
        if is_transformers:
            experts_first(model, config, {name: record.scheme for name, (_, record) in packed.items()})
            hugging_face.add_names_on_disk(model, config)
        ModelCompressor(quantization_config=config).update_config(str(folder))
        if is_transformers and caches:
            hugging_face.add_heads(model, folder)
            hugging_face.warn_of_caches(unread_caches(model))
        if is_transformers:
            dtype = hugging_face.mend_layout(model, config, packed, folder)
    if is_transformers:
        hugging_face.warn_of_misfits(model)
        hugging_face.warn_of_dropped(model)
    own = _own({name: records[name][1] for name in records if name in dense}, on_disk, dtype)
    if entries := online_entries(model):
        own["online"] = entries
        seal(folder)
    if not is_transformers and (steps := record_of(model)):
        own["structure"] = steps
    if len(own) > 3 or own["dense"] or own["names"]:
        (folder / OWN_FILE).write_text(json.dumps(own, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _own(dense: Mapping[str, Quantized], on_disk: Mapping[str, str], dtype: torch.dtype | None) -> dict[str, Any]:
    own = {
        "format_version": FORMAT_VERSION,
        "dense": {name: record.to_json() for name, record in dense.items()},
        "names": {name: other for name, other in on_disk.items() if name != other},
    }
    return own if dtype is None else own | {"dtype": str(dtype).removeprefix("torch.")}


def _state_on_disk(model: nn.Module, packed: Records, stored: Stored) -> dict[str, Tensor]:
    """The state dict, each packed weight replaced by its packed tensors, module by module; the rest is not copied."""
    name_of = {id(module): name for name, (module, _) in packed.items()}
    packed_at = {
        f"{clean_name(path)}.weight": name_of[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in name_of
    }
    experts = _experts_on_disk(model, packed)
    done: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    first: dict[int, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        key = clean_name(key)
        if isinstance(value, Tensor):
            value = _apart(value, first)
        if key in experts:
            state |= experts[key]
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} in the state dict is a {type(value).__name__}; safetensors holds tensors only")
        if (name := packed_at.get(key)) is None:
            state[key] = value
            continue
        if name not in done:
            there = {local: tensor.cpu().contiguous() for local, tensor in stored.get(name, {}).items()}
            done[name] = there or pack(name, *packed[name])
        state |= {key.removesuffix("weight") + local: tensor for local, tensor in done[name].items()}
    return state


def _apart(value: Tensor, first: dict[int, Tensor]) -> Tensor:
    """The tensor without gradient; a copy where it shares its memory without being tied (one Parameter).

    Writers keep one of equal views, and a model that is built anew does not share them.
    """
    if value.is_meta or not value.numel():
        return value.detach()
    earlier = first.setdefault(value.untyped_storage().data_ptr(), value)
    return value.detach() if earlier is value else value.detach().clone()


def _experts_on_disk(model: nn.Module, packed: Records) -> dict[str, dict[str, Tensor]]:
    """By key of a tensor of fused experts, what stands for it on disk: each expert apart, packed or dense."""
    found: dict[str, dict[str, Tensor]] = {}
    if not any(isinstance(module, ExpertLinear) for module, _ in packed.values()):
        return found
    for name, on_disk in names_of_experts(model).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, ExpertLinear)
        local = pack(name, *packed[name]) if name in packed else {"weight": linear.weight.detach()}
        key = f"{name.rsplit('.', 2)[0]}.{linear.fused}"
        found.setdefault(key, {}).update({f"{on_disk}.{part}": tensor for part, tensor in local.items()})
    return found


def _dense_on_disk(model: nn.Module, records: Records) -> dict[str, str]:
    """Quantized modules whose weight stays dense on disk, and why."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(clean_name(name))
    reasons = {}
    for name, (module, _) in records.items():
        if not is_packable(module):
            reasons[name] = f"no loader reads a packed {type(module).__name__}"
        elif isinstance(module, ExpertLinear):
            continue
        elif others := [other for other in owners[id(module.weight)] if other != name]:
            reasons[name] = f"it shares its weight with {others[0]!r}"
    return reasons


def _warn_dense(reasons: Mapping[str, str], records: Records) -> None:
    if not reasons:
        return
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:5])
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    warnings.warn(
        f"{len(reasons)} of {len(records)} quantized modules are written with dense weights, on their grid, "
        f"so their size on disk does not shrink: {listed}{more}",
        stacklevel=3,
    )
    if active := [name for name in reasons if records[name][1].scheme.input_activations is not None]:
        warnings.warn(
            f"transformers and vLLM will not quantize the inputs of {', '.join(active[:5])}, so their outputs differ "
            f"from this model's; lightning_compress.load restores it",
            stacklevel=3,
        )


def _warn_rows(model: nn.Module, packed: Records) -> None:
    """Of rows [rows, features] whose scales plain transformers takes together: their answers depend on one another."""
    rows = [name for name, (module, _) in packed.items() if saw_rows(module)]
    if rows and hugging_face.is_transformers(model):
        warnings.warn(
            f"{len(rows)} modules, such as {rows[0]}, get inputs [rows, features]: here each row has a scale of its "
            f"own, plain transformers takes one for all rows, so that its answers depend on the rest of the batch; "
            f"load the folder with lightning_compress.load, or add these modules to ignore",
            stacklevel=4,
        )


def _check_weights(model: nn.Module, stored: Stored) -> None:
    away = [clean_name(name) for name, p in model.named_parameters() if p.is_meta]
    if away := [name for name in away if name.rpartition(".")[0] not in stored]:
        raise ValueError(f"{len(away)} weights are not in memory, such as {away[0]}; load the model without offloading")
    if broken := nonfinite(model):
        listed = ", ".join(clean_name(name) for name in broken[:5])
        raise ValueError(
            f"NaN or Inf in {len(broken)} parameters or buffers, such as {listed}; such a model is not exported"
        )


def _yaml(recipe: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe must hold plain numbers, strings, lists and dicts: {error}") from error


# -- loading ----------------------------------------------------------------------------------------------------------


def _quantization_of(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config``, empty where nothing is quantized."""
    quantization = config.get("quantization_config", {})
    if not isinstance(quantization, dict):
        raise ValueError(f"{path}: quantization_config must be an object, got {quantization!r:.80}")
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise ValueError(
            f"{path.parent} was quantized by {method!s:.80}, expected compressed-tensors; load it with transformers"
        )
    return quantization


def _unpacked(
    name: str, tensors: dict[str, Tensor], module: nn.Module, scheme: QuantizationScheme
) -> tuple[Tensor, Quantized]:
    """The dense weight of one module, of the dtype of the model, and its record."""
    expected = weight_of(module)
    shape = tensors["weight_shape"].tolist() if "weight_shape" in tensors else None
    shape = list(tensors["weight"].shape) if "weight" in tensors else shape
    if shape is not None and shape != list(expected.shape):  # before so much memory is asked for
        raise ValueError(f"its weight is {shape!s:.80} in the file, and in the model {list(expected.shape)}")
    weight, record = unpack(tensors, type(module), scheme)
    if weight.shape != expected.shape:
        raise ValueError(f"its weight unpacks to {list(weight.shape)}, and in the model it is {list(expected.shape)}")
    check_record(name, weight, record)
    return (weight.to(expected.dtype) if is_microscaled(scheme.weights) else weight), record


def _check_finite(folder: Path, broken: list[str]) -> None:
    if broken:
        raise ValueError(
            f"{folder}: NaN or Inf in {len(broken)} parameters or buffers, such as {', '.join(broken[:5])}; the files "
            f"are damaged, or were written by a version that did not look at buffers"
        )


def _scales_as(dtype: torch.dtype | None, tensors: dict[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Scales of the model's dtype in another one, as transformers reads them; those with a format of their own stay."""
    if dtype is None or is_microscaled(scheme.weights):
        return tensors
    return tensors | {name: tensors[name].to(dtype) for name in ("weight_scale", "input_scale") if name in tensors}


def _say(packing: Packing, advise: bool) -> None:
    """What was packed and what not: a warning where ``load`` could build a model that packs more."""
    better = [f"load(folder, dtype={dtype}) packs {count} of them" for dtype, count in packing.faster.items()]
    if better and advise:
        warnings.warn(f"{packing}; {better[0]}, packed=False keeps all dense without this warning", stacklevel=3)
    elif packing.names or packing.dense:
        log.info("%s", packing)


def _fuse(model: nn.Module, folder: Path, asked: bool) -> None:
    """Fuse what multiplies the same tensor, found by a call with the dummy inputs of transformers."""
    fault = None
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        fault = "no Linear of it is packed"
    elif not hugging_face.is_transformers(model):
        fault = "it is no model of transformers; call quant.packed.fuse_siblings(model, *example_inputs)"
    else:
        try:
            if not fuse_siblings(model, **hugging_face.example_of(model)):
                fault = "no packed Linears with equal schemes multiply the same tensor"
        except Exception as error:  # of any model's code: pictures or speech instead of tokens
            fault = f"its dummy inputs fail ({error}); call quant.packed.fuse_siblings(model, *example_inputs)"
    if asked and fault is not None:
        raise ValueError(f"{folder}: nothing to fuse, {fault}; or leave fuse out")


def _fill(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy ``weights`` into the parameters and buffers of ``model``; ValueError when they do not fit."""
    own = {clean_name(key): value for key, value in model.state_dict().items()}
    filled = {own[key].data_ptr() for key in weights if key in own}
    missing = [key for key, value in own.items() if key not in weights and value.data_ptr() not in filled]  # not tied
    if (unknown := sorted(weights.keys() - own.keys())) or missing:
        raise ValueError(
            f"{folder} does not fit this {type(model).__name__}: the model lacks {unknown[:5]}, "
            f"the folder lacks {missing[:5]}; build the model as it was when it was saved"
        )
    for key, value in weights.items():
        there = own[key]
        if (there.shape, there.dtype) != (value.shape, value.dtype) or there.is_meta:
            raise ValueError(
                f"{key!r} is {value.dtype} {tuple(value.shape)} in {folder}, {there.dtype} {tuple(there.shape)} on "
                f"{there.device} in the model; build it with the same sizes and dtype (model.to(...)), not on meta"
            )
    with torch.no_grad():
        for key, value in weights.items():
            own[key].copy_(value)
    return model


def _read_caches(layout: nn.Module, scheme: Mapping[str, Any] | None, files: TensorFiles) -> dict[str, QuantizedCache]:
    """Records of the KV cache, by attention module."""
    if scheme is None:
        return {}
    args = QuantizationArgs.model_validate(scheme)
    tensor_keys = QuantizedCache.tensor_names(args)
    modules = list(attention_modules(layout))
    on_disk = hugging_face.names_on_disk(layout, modules) if hugging_face.is_transformers(layout) else {}
    caches = {name: QuantizedCache(args, **files.take(on_disk.get(name, name), tensor_keys)) for name in modules}
    for name, cache in caches.items():
        for local, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if scale is not None and not (scale.isfinite() & (scale > 0)).all():
                raise ValueError(f"{name}.{local} is not finite and positive everywhere")
    return caches
