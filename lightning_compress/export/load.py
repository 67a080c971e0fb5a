"""Load what ``save`` wrote: a dense model with records, or one that computes on packed weights.

The folder is described in save.py. Names, shapes and numbers in it are checked before they are used.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from torch import Tensor, nn

from lightning_compress.export import hugging_face
from lightning_compress.export.experts import names_of_experts
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.export.online import read_online, unsealed
from lightning_compress.export.own_file import OWN_FILE, read_own
from lightning_compress.export.quantization_config import matched
from lightning_compress.export.quantized_modules import QuantizedModules
from lightning_compress.export.tensors import DeferredTensor, TensorFiles, naming, read_json
from lightning_compress.export.transform_config import read_transforms
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.matrix import as_matrix, weight_of
from lightning_compress.layers.module_weights import ModuleWeight, hide, reveal, weights_inside
from lightning_compress.layers.records import Record
from lightning_compress.layers.split_experts import fused_experts, join, split
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules
from lightning_compress.quant.packed import (
    PackedLinear,
    Packing,
    PackingChoice,
    check_dispatch,
    fuse_siblings,
    multiply_codes,
)
from lightning_compress.quant.packing import check_record
from lightning_compress.quant.record import Quantized
from lightning_compress.structure.surgery import record_of, reshape

__all__ = ["load"]

log = logging.getLogger(__name__)


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    *,
    packed: bool | None = None,
    fuse: bool | None = None,
    dtype: torch.dtype | None = None,
    dispatch: Literal["packed", "fastest"] = "packed",
) -> nn.Module:
    """Read what ``save`` wrote: a model that computes on packed weights where that is as quick as dense ones.

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
        dispatch: On a CPU, ``packed`` computes what the scheme says, with the least memory. ``fastest`` computes a
            product densely where its shape makes that faster, by constants that were measured once
            (quant/packed/dispatch.py): inputs are not rounded then, only clipped if their grid is static, and a dense
            copy of the weight may lie beside the packed one.

    Returns:
        ``model``, or the new one, in evaluation mode. Inputs are quantized where the scheme says so.

    Raises:
        ValueError: The folder is not such an export, it does not fit ``model``, another method quantized it,
            nothing in it can be ``packed``, or nothing can be fused with ``fuse=True``.
    """
    source = _open(Path(folder).expanduser().resolve())
    transforms = source.quantization.get("transform_config") or {}
    if "online" in source.own_content or transforms:
        if packed or fuse:
            raise ValueError(
                f"{source.path}: rotations run beside its modules, which packed modules cannot have; leave packed out"
            )
        packed = False
    _check_arguments(source, model, dtype)
    check_dispatch(dispatch, packed)
    files = TensorFiles(source.path)
    layout = _layout(source, model, len(files.names), dtype)
    fastest = dispatch == "fastest"
    choice = PackingChoice(layout, served=packed is None, fastest=fastest) if packed is not False else None
    try:
        model = _loaded(source, files, layout, model, device, choice=choice, dtype=dtype, transforms=transforms)
    finally:
        hide(layout)
    if fuse is not False:
        _fuse(model, source.path, bool(fuse))
    guard_save_pretrained(model)
    return model


def _loaded(
    source: "_Folder",
    files: TensorFiles,
    layout: nn.Module,
    model: nn.Module | None,
    device: torch.device | str | None,
    *,
    choice: PackingChoice | None,
    dtype: torch.dtype | None,
    transforms: Mapping[str, Any],
) -> nn.Module:
    """``model``, or the one that was built as ``layout``, with the weights and records of a folder."""
    is_new = model is None
    model_dtype: torch.dtype | None = cast(Any, layout).config.dtype if is_new else None
    quantized = QuantizedModules(layout, dtype, choice, device, model_dtype)
    _take_quantized(source, quantized, files)
    caches = _read_caches(source, layout, files)
    rotations = read_online(layout, source.own_content.get("online", {}), source.own_file)
    rotations |= read_transforms(layout, transforms, files, source.config_file)
    model = _filled(source, layout, model, _joined(layout, quantized.weights | files.rest()))
    records = quantized.records | _records_of_dense(source, layout)
    quantized.replace_packed(model)
    model = (model if device is None else model.to(device)).eval()
    slices = [layout.get_submodule(name) for name in records]
    if any(isinstance(module, ExpertLinear) for module in slices):
        split(model)
    if any(isinstance(module, ModuleWeight) for module in slices):
        reveal(model)
    _attach(model, [*rotations.items(), *records.items(), *caches.items()])
    join(model)  # slices without records
    if choice is not None:
        _dispatch(model, choice)
        packing = choice.result()
        _report(packing, advise=choice.served and is_new)
        if not choice.served and not packing.names and not choice.unrounded:
            raise ValueError(f"{source.path} holds no quantized Linear with a weight of its own; leave packed out")
    return model


# -- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """The files of an export, its tensors not read yet."""

    path: Path  # absolute
    config: Mapping[str, Any]  # of config.json, without the changes that keep other loaders off (online.py)
    own_content: Mapping[str, Any]  # the content of lightning_compress.json
    quantization: Mapping[str, Any]  # ``quantization_config``; empty where nothing is quantized

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def own_file(self) -> Path:
        return self.path / OWN_FILE


def _open(path: Path) -> _Folder:
    config_file = path / "config.json"
    config, content = read_json(config_file), read_own(path / OWN_FILE)
    if "online" in content:
        with naming(config_file):
            config = unsealed(config)
    quantization = config.get("quantization_config", {})
    if not isinstance(quantization, dict):
        raise ValueError(f"{config_file}: quantization_config must be an object, got {quantization!r:.80}")
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise ValueError(
            f"{path} was quantized by {method!s:.80}, expected compressed-tensors; load it with transformers"
        )
    return _Folder(path, config, content, quantization)


def _check_arguments(source: _Folder, model: nn.Module | None, dtype: torch.dtype | None) -> None:
    if model is None and "model_type" not in source.config:
        raise ValueError(
            f"{source.path} holds no Hugging Face model; build the dense model and call load(folder, model)"
        )
    if dtype is not None and (model is not None or not dtype.is_floating_point):
        raise ValueError(
            f"dtype={dtype} is for a model of transformers that is built here, and floating; hand in a model of that "
            f"dtype instead, or leave dtype out"
        )


def _layout(source: _Folder, model: nn.Module | None, tensors: int, dtype: torch.dtype | None) -> nn.Module:
    """``model``, or the one that config.json describes, in the shapes that it was saved in; slices are modules."""
    if model is None:
        own_dtype = getattr(torch, source.own_content["dtype"]) if "dtype" in source.own_content else None
        model = hugging_face.skeleton(source.path, source.config, tensors, dtype or own_dtype)
    with naming(source.own_file, "structure"):
        reshape(model, source.own_content.get("structure", record_of(model)))
    if hugging_face.is_transformers(model) and fused_experts(model):
        split(model)
    reveal(model)
    return model


# -- quantized modules ------------------------------------------------------------------------------------------------


def _take_quantized(source: _Folder, quantized: QuantizedModules, files: TensorFiles) -> None:
    """Take what ``quantization_config`` names from the files."""
    layout = quantized.layout
    names = names_of_experts(layout) if hugging_face.is_transformers(layout) else {}
    names |= source.own_content["names"]
    schemes = {}
    if source.quantization:
        with naming(source.config_file, "quantization_config"):
            schemes = matched(layout, QuantizationConfig.model_validate(source.quantization))
    for name, scheme in schemes.items():
        quantized.add(name, names.get(name, name), scheme, files)


def _records_of_dense(source: _Folder, layout: nn.Module) -> dict[str, Quantized]:
    """The records of modules whose weight is on its grid and lies dense on the disk."""
    records = {}
    for name, data in source.own_content["dense"].items():
        with naming(source.own_file, f"dense.{name}"):
            records[name] = Quantized.from_json(data)
            check_record(name, as_matrix(layout.get_submodule(name)), records[name])
    return records


def _read_caches(source: _Folder, layout: nn.Module, files: TensorFiles) -> dict[str, QuantizedCache]:
    """Records of the KV cache, by attention module."""
    scheme = source.quantization.get("kv_cache_scheme")
    if scheme is None:
        return {}
    with naming(source.config_file, "kv_cache_scheme"):
        args = QuantizationArgs.model_validate(scheme)
        tensor_keys = QuantizedCache.tensor_names(args)
        modules = list(attention_modules(layout))
        on_disk = hugging_face.names_on_disk(layout, modules) if hugging_face.is_transformers(layout) else {}
        deferred = {name: files.take(on_disk.get(name, name), tensor_keys) for name in modules}
        caches = {name: QuantizedCache(args, **{k: t[...] for k, t in deferred[name].items()}) for name in modules}
        for name, cache in caches.items():
            for local, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
                if scale is not None and not (scale.isfinite() & (scale > 0)).all():
                    raise ValueError(f"{name}.{local} is not finite and positive everywhere")
    return caches


# -- the model --------------------------------------------------------------------------------------------------------


def _filled(
    source: _Folder, layout: nn.Module, model: nn.Module | None, weights: Mapping[str, DeferredTensor]
) -> nn.Module:
    """``model``, or a new one where it is None, with these weights, by their names on disk."""
    if not hugging_face.is_transformers(layout):
        return _fill(source.path, layout, weights)
    added_names = set() if model is None else {*model.state_dict()} & {*weights}
    built = hugging_face.build(source.path, layout, weights, added_names)
    if model is None:
        _check_finite(source.path, nonfinite(built))
        return built
    state = built.state_dict()
    # a buffer or head that was added to the model
    state |= {name: weights[name][...] for name in added_names - state.keys()}
    _check_finite(source.path, nonfinite(model, state))
    model.load_state_dict(state)
    return model


def _joined(layout: nn.Module, weights: dict[str, DeferredTensor]) -> dict[str, DeferredTensor]:
    """``weights`` with one tensor for each parameter whose parts are separate on the disk."""
    for path, home in layout.named_modules():
        prefix = f"{clean_name(path)}." if path else ""
        parts: dict[str, list[DeferredTensor]] = {}
        for local, weight in weights_inside(home).items():
            if (part := weights.pop(f"{prefix}{local}.weight", None)) is not None:
                parts.setdefault(weight.fused, []).append(part)
        for fused, each in parts.items():
            shape = (sum(part.shape[0] for part in each), *each[0].shape[1:])
            weights[f"{prefix}{fused}"] = DeferredTensor(partial(_below_one_another, each), shape, each[0].dtype)
    return weights


def _below_one_another(parts: Iterable[DeferredTensor]) -> Tensor:
    return torch.cat([part[...] for part in parts])


def _check_finite(folder: Path, broken: list[str]) -> None:
    if broken:
        raise ValueError(
            f"{folder}: NaN or Inf in {len(broken)} parameters or buffers, such as {shortlist(broken)}; the files "
            f"are damaged, or were written by a version that did not look at buffers"
        )


def _fill(folder: Path, model: nn.Module, weights: Mapping[str, DeferredTensor]) -> nn.Module:
    """Copy ``weights`` into the parameters and buffers of ``model``; ValueError when they do not fit.

    Each is made twice: nothing is copied before all are known to be right.
    """
    checked = _OneAtATime(weights)
    _check_finite(folder, nonfinite(model, cast(Mapping[str, Tensor], checked)))
    state = {clean_name(key): value for key, value in model.state_dict().items()}
    filled = {state[key].data_ptr() for key in weights if key in state}
    missing = [key for key, value in state.items() if key not in weights and value.data_ptr() not in filled]  # not tied
    if (unknown := sorted(weights.keys() - state.keys())) or missing:
        raise ValueError(
            f"{folder} does not fit this {type(model).__name__}: the model lacks {unknown[:5]}, "
            f"the folder lacks {missing[:5]}; build the model as it was when it was saved"
        )
    for key, target in state.items():
        if key not in weights:
            continue
        shape, dtype = checked.kinds[key]
        if (target.shape, target.dtype) != (shape, dtype) or target.is_meta:
            raise ValueError(
                f"{key!r} is {dtype} {tuple(shape)} in {folder}, {target.dtype} {tuple(target.shape)} on "
                f"{target.device} in the model; build it with the same sizes and dtype (model.to(...)), not on meta"
            )
    with torch.no_grad():
        for key, weight in weights.items():
            state[key].copy_(weight[...])
    return model


class _OneAtATime(dict[str, DeferredTensor]):
    """Weights that are made one at a time, as they are asked for; notes shape and dtype of each."""

    def __init__(self, weights: Mapping[str, DeferredTensor]):
        super().__init__(weights)
        self.kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        value = self[name][...]
        self.kinds[name] = value.shape, value.dtype
        return value


def _attach(model: nn.Module, records: Iterable[tuple[str, Record]]) -> None:
    """Put records on modules of the model, in this order, on the device of each module."""
    for name, record in records:
        module = model.get_submodule(name)
        weight = weight_of(module) if hasattr(module, "weight") else next(module.parameters())
        record.to(weight.device).attach(module)


def _dispatch(model: nn.Module, choice: PackingChoice) -> None:
    """Let convolutions multiply codes, and, with ``fastest``, modules compute densely where that is faster."""
    convolutions = multiply_codes(model, fastest=choice.fastest)
    if convolutions:
        log.info("%d convolutions multiply int8 codes", len(convolutions))
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.fastest = choice.fastest
    for name in choice.unrounded:
        module = model.get_submodule(name)
        if (record := Quantized.of(module)) is not None:
            record.leave_inputs(module)
    if choice.fastest:
        log.info("dispatch='fastest': %d Linears are dense, with inputs that are not rounded", len(choice.unrounded))


def _report(packing: Packing, advise: bool) -> None:
    """Log what was packed, or warn where ``load`` could build a model in which more is packed."""
    better = [f"load(folder, dtype={dtype}) packs {count} of them" for dtype, count in packing.faster.items()]
    if better and advise:
        warnings.warn(f"{packing}; {better[0]}, packed=False keeps all dense without this warning", stacklevel=3)
    elif packing.names or packing.dense:
        log.info("%s", packing)


def _fuse(model: nn.Module, folder: Path, required: bool) -> None:
    """Fuse packed Linears that multiply the same tensor, found by a call with the dummy inputs of transformers."""
    fault = None
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        fault = "no Linear of it is packed"
    elif not hugging_face.is_transformers(model):
        fault = "it is not a model of transformers; call quant.packed.fuse_siblings(model, *example_inputs)"
    else:
        try:
            if not fuse_siblings(model, **hugging_face.example_of(model)):
                fault = "no packed Linears with equal schemes multiply the same tensor"
        except Exception as error:  # of any model's code: pictures or speech instead of tokens
            fault = f"its dummy inputs fail ({error}); call quant.packed.fuse_siblings(model, *example_inputs)"
    if required and fault is not None:
        raise ValueError(f"{folder}: nothing to fuse, {fault}; or leave fuse out")
