"""Load what ``save`` wrote: a dense model with records, or one that computes on packed weights.

The folder is described in save.py. Names, shapes and numbers in it are checked before they are used.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn

from lightning_compress.export import hugging_face
from lightning_compress.export.experts import names_of_experts
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.export.online import read_online, unsealed
from lightning_compress.export.own_file import OWN_FILE, read_own
from lightning_compress.export.quantization_config import matched
from lightning_compress.export.tensors import TensorFiles, naming, read_json
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.matrix import as_matrix, weight_of
from lightning_compress.layers.records import Record
from lightning_compress.layers.split_experts import fused_experts, join, split
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules
from lightning_compress.quant.packed import PackedLinear, Packing, fuse_siblings, pack_linears
from lightning_compress.quant.packing import check_record, tensor_names, unpack
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

    Returns:
        ``model``, or the new one, in evaluation mode. Inputs are quantized where the scheme says so.

    Raises:
        ValueError: The folder is not such an export, it does not fit ``model``, another method quantized it,
            nothing in it can be ``packed``, or nothing can be fused with ``fuse=True``.
    """
    source = _open(Path(folder).expanduser().resolve())
    if "online" in source.own_content:
        if packed or fuse:
            raise ValueError(
                f"{source.path}: rotations run beside its modules, which packed modules cannot have; leave packed out"
            )
        packed = False
    _check_arguments(source, model, dtype)
    files = TensorFiles(source.path)
    layout = _layout(source, model, len(files.names), dtype)
    quantized = _read_quantized(source, layout, files, dtype, keep=packed is not False)
    caches = _read_caches(source, layout, files)
    rotations = read_online(layout, source.own_content.get("online", {}), source.own_file)
    is_new = model is None
    model = _filled(source, layout, model, quantized.weights | files.rest())
    model = (model if device is None else model.to(device)).eval()
    if any(isinstance(layout.get_submodule(name), ExpertLinear) for name in quantized.records):
        split(model)
    _attach(model, [*rotations.items(), *quantized.records.items(), *caches.items()])
    join(model)  # experts without records
    if packed is not False:
        with naming(source.path):
            packing = pack_linears(model, quantized.stored, served=packed is None)
        _report(packing, advise=packed is None and is_new)
        if packed and not packing.names:
            raise ValueError(f"{source.path} holds no quantized Linear with a weight of its own; leave packed out")
    if fuse is not False:
        _fuse(model, source.path, bool(fuse))
    guard_save_pretrained(model)
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


@dataclass(frozen=True)
class _Quantized:
    """The quantized modules of a folder."""

    weights: dict[str, Tensor]  # dense, by their name on disk
    records: dict[str, Quantized]  # by name of the module
    stored: dict[str, dict[str, Tensor]]  # as they are on disk, by name of the module


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
    """``model``, or the one that config.json describes, in the shapes that it was saved in; experts are split."""
    if model is None:
        own_dtype = getattr(torch, source.own_content["dtype"]) if "dtype" in source.own_content else None
        model = hugging_face.skeleton(source.path, source.config, tensors, dtype or own_dtype)
    with naming(source.own_file, "structure"):
        reshape(model, source.own_content.get("structure", record_of(model)))
    if hugging_face.is_transformers(model) and fused_experts(model):
        split(model)
    return model


# -- quantized modules ------------------------------------------------------------------------------------------------


def _read_quantized(
    source: _Folder, layout: nn.Module, files: TensorFiles, dtype: torch.dtype | None, *, keep: bool
) -> _Quantized:
    """Unpack what ``quantization_config`` names, and read the grids of what lies dense on the disk.

    Tensors of quantized modules are removed from ``files``; ``keep`` keeps packed ones too, for packed Linears.
    ``dtype`` is that of scales; None: as they are.
    """
    quantized = _Quantized({}, {}, {})
    names = names_of_experts(layout) if hugging_face.is_transformers(layout) else {}
    names |= source.own_content["names"]
    schemes = {}
    if source.quantization:
        with naming(source.config_file, "quantization_config"):
            schemes = matched(layout, QuantizationConfig.model_validate(source.quantization))
    for name, scheme in schemes.items():
        on_disk, module = names.get(name, name), layout.get_submodule(name)
        if isinstance(module, ExpertLinear) and f"{on_disk}.weight_scale" not in files.names:
            continue  # a target by class, but these experts stayed dense
        with naming(files.path_of(f"{on_disk}.weight_scale"), repr(name)):
            tensors = _scales_as(dtype, files.take(on_disk, tensor_names(type(module), scheme)), scheme)
            quantized.weights[f"{on_disk}.weight"], quantized.records[name] = _unpacked(name, tensors, module, scheme)
        if keep:
            quantized.stored[name] = dict(tensors)
    for name, data in source.own_content["dense"].items():
        with naming(source.own_file, f"dense.{name}"):
            quantized.records[name] = Quantized.from_json(data)
            check_record(name, as_matrix(layout.get_submodule(name)), quantized.records[name])
    return quantized


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


def _scales_as(dtype: torch.dtype | None, tensors: dict[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Scales of the model's dtype in another one, as transformers reads them; those with a format of their own stay."""
    if dtype is None or is_microscaled(scheme.weights):
        return tensors
    return tensors | {name: tensors[name].to(dtype) for name in ("weight_scale", "input_scale") if name in tensors}


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
        caches = {name: QuantizedCache(args, **files.take(on_disk.get(name, name), tensor_keys)) for name in modules}
        for name, cache in caches.items():
            for local, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
                if scale is not None and not (scale.isfinite() & (scale > 0)).all():
                    raise ValueError(f"{name}.{local} is not finite and positive everywhere")
    return caches


# -- the model --------------------------------------------------------------------------------------------------------


def _filled(source: _Folder, layout: nn.Module, model: nn.Module | None, weights: Mapping[str, Tensor]) -> nn.Module:
    """``model``, or a new one where it is None, with these weights, by their names on disk."""
    if not hugging_face.is_transformers(layout):
        _check_finite(source.path, nonfinite(layout, weights))
        return _fill(source.path, layout, weights)
    added_names = set() if model is None else {*model.state_dict()} & {*weights}
    built = hugging_face.build(source.path, layout, weights, added_names)
    if model is None:
        _check_finite(source.path, nonfinite(built))
        return built
    state = built.state_dict()
    state |= {
        name: weights[name] for name in added_names - state.keys()
    }  # a buffer or head that was added to the model
    _check_finite(source.path, nonfinite(model, state))
    model.load_state_dict(state)
    return model


def _check_finite(folder: Path, broken: list[str]) -> None:
    if broken:
        raise ValueError(
            f"{folder}: NaN or Inf in {len(broken)} parameters or buffers, such as {shortlist(broken)}; the files "
            f"are damaged, or were written by a version that did not look at buffers"
        )


def _fill(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy ``weights`` into the parameters and buffers of ``model``; ValueError when they do not fit."""
    state = {clean_name(key): value for key, value in model.state_dict().items()}
    filled = {state[key].data_ptr() for key in weights if key in state}
    missing = [key for key, value in state.items() if key not in weights and value.data_ptr() not in filled]  # not tied
    if (unknown := sorted(weights.keys() - state.keys())) or missing:
        raise ValueError(
            f"{folder} does not fit this {type(model).__name__}: the model lacks {unknown[:5]}, "
            f"the folder lacks {missing[:5]}; build the model as it was when it was saved"
        )
    for key, value in weights.items():
        target = state[key]
        if (target.shape, target.dtype) != (value.shape, value.dtype) or target.is_meta:
            raise ValueError(
                f"{key!r} is {value.dtype} {tuple(value.shape)} in {folder}, {target.dtype} {tuple(target.shape)} on "
                f"{target.device} in the model; build it with the same sizes and dtype (model.to(...)), not on meta"
            )
    with torch.no_grad():
        for key, value in weights.items():
            state[key].copy_(value)
    return model


def _attach(model: nn.Module, records: Iterable[tuple[str, Record]]) -> None:
    """Put records on modules of the model, in this order, on the device of each module."""
    for name, record in records:
        module = model.get_submodule(name)
        weight = weight_of(module) if hasattr(module, "weight") else next(module.parameters())
        record.to(weight.device).attach(module)


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
