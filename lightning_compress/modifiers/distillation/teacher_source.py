"""Sources of a teacher: the model itself, a module, a callable, a checkpoint, a Hugging Face folder.

Nothing is unpickled: checkpoints are read with ``weights_only``, or are safetensors.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.structure.surgery import record_of

__all__ = ["build_teacher"]


def build_teacher(source: Any, model: nn.Module) -> Callable[..., Any]:
    """The teacher of a model; a module comes frozen and in eval mode.

    Args:
        source: ``"self"``, a module, a callable with the model's arguments, the path of a checkpoint (``.ckpt``,
            ``.pt``, ``.safetensors``: weights for a copy of the model) or of a Hugging Face folder.
        model: The student, before any change.

    Raises:
        ValueError: The source is none of these, the file is missing, only unpickling could read it, its tensors do not
            fit, or it shares parameters with the model.
    """
    if not isinstance(source, str | Path):
        if not callable(source):
            raise ValueError(f"teacher={source!r} is neither a module nor callable, 'self' or a path")
        teacher = source
    elif source == "self":
        teacher = _copy(model, source)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"teacher={str(source)!r}: no such file or folder; 'self' distils from the model itself")
        if path.is_dir():
            teacher = _from_folder(path, model)
        else:
            teacher = _copy(model, source)
            _load_weights(teacher, path)
    if isinstance(teacher, nn.Module):
        student = {id(p) for p in model.parameters()}
        if shared := [name for name, p in teacher.named_parameters() if id(p) in student]:
            raise ValueError(
                f"the teacher shares {len(shared)} parameters with the model ({shared[:3]}), so they would train too; "
                f"give teacher='self' for a copy of the model"
            )
        teacher.eval().requires_grad_(False)
    return teacher


def _copy(model: nn.Module, source: str | Path) -> nn.Module:
    changed = [name for name, module in model.named_modules() if hasattr(module, "parametrizations")]
    changed += [next(iter(step["shapes"] if "shapes" in step else step["layers"])) for step in record_of(model)]
    if changed:
        raise ValueError(
            f"teacher={str(source)!r} would copy a model that another modifier has changed already, in {changed[:3]}: "
            f"let DistillationModifier stand before it in the recipe"
        )
    return copy.deepcopy(model)


def _from_folder(path: Path, model: nn.Module) -> nn.Module:
    """A model of the class that the folder's config names, else of the student's class."""
    named = _class_named(path / "config.json")
    build = getattr(type(model), "from_pretrained", None)
    if named and named != type(model).__name__:
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"teacher={str(path)!r} is a {named}, which needs transformers: {error}") from error
        build = getattr(getattr(transformers, named, None), "from_pretrained", None)
    if build is None:
        kind = named or type(model).__name__
        raise ValueError(
            f"teacher={str(path)!r} is a folder, and {kind} has no from_pretrained: expected a Hugging Face folder "
            f"with a config.json; give a checkpoint of the model, or a module"
        )
    try:
        loaded: nn.Module = build(path, local_files_only=True)
    except UnpicklingError:
        raise _objects_error(path) from None
    except Exception as error:  # whatever transformers and safetensors raise on a damaged folder
        raise ValueError(f"teacher={str(path)!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return loaded


def _class_named(config: Path) -> str:
    """The first of the ``architectures`` of a config.json; empty where there is none."""
    if not config.is_file():
        return ""
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        name = (data.get("architectures") or [""])[0]
    except (AttributeError, KeyError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"teacher: {config} is not the config of a model: {type(error).__name__}: {error}") from error
    if not isinstance(name, str):
        raise ValueError(f"teacher: {config} names {name!r} in architectures, expected the name of a class")
    return name


def _load_weights(teacher: nn.Module, path: Path) -> None:
    """Tensors of a file into the teacher; keys of a LightningModule lose their prefix."""
    weights = _read(path)
    tensors = teacher.state_dict()
    first = next(iter(tensors), "")
    weights = {key.replace("_orig_mod.", ""): value for key, value in weights.items()}  # saved while compiled
    prefixes = {key.removesuffix(first) for key in weights if key.endswith(first)}
    prefix = max(sorted(prefixes), key=lambda p: sum(f"{p}{key}" in weights for key in tensors), default="")
    values = {key: weights[f"{prefix}{key}"] for key in tensors if f"{prefix}{key}" in weights}
    tied = {tensor.data_ptr() for key, tensor in tensors.items() if key in values}
    unfit = [
        key
        for key, tensor in tensors.items()
        if (values[key].shape != tensor.shape if key in values else tensor.data_ptr() not in tied)
    ]
    if unfit:
        raise ValueError(
            f"teacher={str(path)!r} lacks {len(unfit)} tensors of the model or has other shapes: {unfit[:3]}; a file "
            f"holds weights for a copy of the model; give a teacher of another size as a folder or as a module"
        )
    teacher.load_state_dict(values, strict=False)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"teacher={str(path)!r} is not a complete safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        code = f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'teacher.pt')"
        hint = f" (for a checkpoint of your own runs, with a network among its hyperparameters: {code})"
        raise _objects_error(path, hint) from None
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"teacher={str(path)!r} holds a {type(content).__name__}, expected a state_dict or a Lightning checkpoint"
        )
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def _objects_error(path: Path, hint: str = "") -> ValueError:
    """Replaces the error of torch, which advises to disable the check."""
    return ValueError(
        f"teacher={str(path)!r} is damaged, or holds objects, which can run code and are not read; expected tensors "
        f"and plain values: save the teacher's state_dict, or a safetensors file{hint}"
    )
