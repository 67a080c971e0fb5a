"""Rotations beside modules as compressed-tensors states them: ``transform_config`` in quantization_config.

For rotations whose record says ``in_config`` (modifiers/rotation/online.py). Of each order h of Sylvester's matrix

    config.json                          a scheme hadamard_h: type hadamard, head_dim h, at input and weight_input
    <module>.hadamard_h_input.weight     the matrix itself, +-1 [h, h], once, beside the first module

vLLM multiplies the inputs of the modules that the scheme selects by it (weights are turned already); it reads the
tensor for its fused products, shared by all modules. transformers 5.23 reads neither, and so computes something else:
the model card says it.
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformLocation, TransformScheme
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn

from lightning_compress.export import hugging_face
from lightning_compress.export.contents import Contents
from lightning_compress.export.tensors import TensorFiles, naming
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.matrix import as_matrix, is_supported
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations

__all__ = ["check_readers", "read_transforms", "rotation_note", "transform_config", "transform_tensors"]

Side = Literal["input", "output"]
NOTE = """## Inputs are rotated

The inputs of {count} Linears, such as {first}, are multiplied by Hadamard matrices, block by block, as
`transform_config` in config.json states; their weights are rotated already.

- vLLM applies it (since 2026-07; without tensor parallelism, and to Linears without a bias).
- `lightning_compress.load` applies it.
- transformers does not: `from_pretrained` loads this folder without an error, and computes something else."""


def check_readers(contents: Contents, verify: bool = False) -> None:
    """ValueError where an export cannot state rotations in config.json; warns of loaders that do not apply them.

    Args:
        contents: What is written.
        verify: Plain transformers must give the outputs of the model.
    """
    modules = {clean_name(n): m for n, (m, record) in OnlineRotations.find(contents.model).items() if record.in_config}
    if not modules:
        return
    first, kind = next(iter(modules)), type(contents.model).__name__
    others = [clean_name(n) for n, (_, record) in OnlineRotations.find(contents.model).items() if not record.in_config]
    fault = ""
    if others:
        fault = f"{others[0]!r} has a rotation that config.json cannot state"
    elif not contents.is_transformers:
        fault = f"vLLM, which reads it, loads models of transformers, and this is a {kind}"
    elif not contents.packed:
        fault = "nothing is quantized, so that there is no quantization_config to hold it"
    if fault:
        raise ValueError(
            f"the inputs of {first!r} are turned with transform_config=True, but {fault}; set transform_config=False: "
            f"then lightning_compress.load loads the folder"
        )
    if verify:
        raise ValueError(
            f"verify=True lets plain transformers load the folder, which ignores the rotation of the inputs of "
            f"{len(modules)} modules, such as {first!r}, and computes something else; leave verify out"
        )
    warnings.warn(
        f"config.json states the rotation of the inputs of {len(modules)} modules as transform_config: vLLM and "
        f"lightning_compress.load apply it; transformers loads the folder without an error and computes something else",
        stacklevel=3,
    )
    if biased := [name for name, module in modules.items() if getattr(module, "bias", None) is not None]:
        warnings.warn(
            f"vLLM refuses to rotate the inputs of Linears with a bias, such as {shortlist(biased)}; add them to "
            f"ignore of the modifier that turns them",
            stacklevel=3,
        )


def transform_config(model: nn.Module) -> TransformConfig | None:
    """The config of the rotations of a model of transformers; None where it has none that config.json states."""
    groups = _groups(model)
    if not groups:
        return None
    linears = [clean_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    on_disk = _names_on_disk(model, [*linears, *chain(*groups.values())])
    schemes = {}
    for (side, order), names in groups.items():
        targets, ignore = ["Linear"], _both([name for name in linears if name not in set(names)], on_disk)
        if not set(names) <= set(linears):  # the Conv1D of GPT-2
            targets, ignore = _both(names, on_disk), []
        apply = [
            TransformArgs(targets=targets, location=TransformLocation(side), ignore=ignore),
            TransformArgs(targets=targets, location=TransformLocation(f"weight_{side}"), inverse=True, ignore=ignore),
        ]
        schemes[_scheme_name(side, order)] = TransformScheme(type="hadamard", apply=apply, head_dim=order)
    return TransformConfig(config_groups=schemes)


def transform_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The matrix of each order, +-1, beside the first module that is turned by it, by its name on disk."""
    groups = _groups(model)
    on_disk = _names_on_disk(model, [names[0] for names in groups.values()]) if groups else {}
    return {
        f"{on_disk[names[0]]}.{_scheme_name(side, order)}_{side}.weight": _sylvester(order).float()
        for (side, order), names in groups.items()
    }


def rotation_note(model: nn.Module) -> str:
    """For the model card, who applies the rotation; empty where config.json states no rotation."""
    names = list(dict.fromkeys(chain(*_groups(model).values())))
    return NOTE.format(count=len(names), first=names[0]) if names else ""


def read_transforms(
    layout: nn.Module, config: Mapping[str, Any], files: TensorFiles, path: Path
) -> dict[str, OnlineRotations]:
    """Records from ``transform_config``, by module; their matrices are taken from the files.

    Args:
        layout: The model, its weights perhaps on meta.
        config: The config; empty where there is none.
        files: The tensors of the folder.
        path: The file of the config.

    Raises:
        ValueError: A transform is not one that this package applies, or a matrix is not Sylvester's; names it.
    """
    sides: dict[str, dict[str, OnlineRotation]] = {}
    if not config:
        return {}
    with naming(path, "transform_config"):
        for group, scheme in TransformConfig.model_validate(config).config_groups.items():
            if scheme.type != "hadamard" or scheme.randomize:
                raise ValueError(f"{group}: type {scheme.type!r}, randomize={scheme.randomize}, expected 'hadamard'")
            for args in scheme.apply:
                for name, rotation in _selected(layout, group, scheme.head_dim, args):
                    if sides.setdefault(name, {}).setdefault(rotation.side, rotation) is not rotation:
                        raise ValueError(f"{group}: the {rotation.side} of {name!r} is turned twice")
                _take_matrices(files, f"{group}_{args.location}")
    return {name: OnlineRotations(tuple(both.values()), in_config=True) for name, both in sides.items()}


def _selected(
    layout: nn.Module, group: str, order: int | None, args: TransformArgs
) -> Iterator[tuple[str, OnlineRotation]]:
    """Modules whose inputs or outputs are turned at every call, and by what."""
    location = TransformLocation(args.location)
    if not location.is_online():
        return
    if location not in (TransformLocation.INPUT, TransformLocation.OUTPUT):
        raise ValueError(f"{group}: location {location.value!r}, expected 'input' or 'output'")
    side: Side = "input" if location is TransformLocation.INPUT else "output"
    for name, module in layout.named_modules():
        if not is_supported(module) or not is_match(clean_name(name), module, args.targets, args.ignore):
            continue
        if isinstance(module, WeightSlice):
            raise ValueError(f"{group}: {name!r} is a slice of a tensor that holds all experts, and is not turned")
        width = as_matrix(module).shape[1 if side == "input" else 0]
        size = order or width
        if size < 1 or size & (size - 1) or width % size:
            raise ValueError(f"{group}: head_dim {size} is not a power of two that divides the {width} of {name!r}")
        yield clean_name(name), OnlineRotation(side, (1,) * size)


def _take_matrices(files: TensorFiles, name: str) -> None:
    """Take the matrices of one scheme; each must be Sylvester's."""
    for key in [key for key in files.names if key.endswith(f".{name}.weight")]:
        local = f"{name}.weight"
        H = files.take(key.removesuffix(f".{local}"), (local,))[local][...]
        if H.ndim != 2 or len(H) & (len(H) - 1) or not torch.equal(H.double(), _sylvester(len(H))):
            raise ValueError(f"{key} {tuple(H.shape)} is not Sylvester's Hadamard matrix")


def _sylvester(order: int) -> Tensor:
    """The matrix of +-1 of a power of two, float64."""
    return OnlineRotation("input", (1,) * order).matrix().sign()


def _groups(model: nn.Module) -> dict[tuple[Side, int], list[str]]:
    """Names of the modules by side and order of the matrix that turns it."""
    groups: dict[tuple[Side, int], list[str]] = {}
    for name, (_, record) in OnlineRotations.find(model).items():
        for rotation in record.rotations if record.in_config else ():
            groups.setdefault((rotation.side, len(rotation.signs)), []).append(clean_name(name))
    return groups


def _scheme_name(side: Side, order: int) -> str:
    return f"hadamard_{order}" if side == "input" else f"hadamard_{order}_back"


def _names_on_disk(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Names on disk of modules of a model of transformers."""
    return {name: name for name in names} | hugging_face.names_on_disk(cast(Any, model), names)


def _both(names: list[str], on_disk: Mapping[str, str]) -> list[str]:
    """Names of modules, and those on disk: vLLM knows the latter."""
    return list(dict.fromkeys([*names, *(on_disk[name] for name in names)]))
