"""Schemes from what the user wrote: preset names, schemes in full, config_groups.

Schemes are those of compressed-tensors, and so are presets but INT8_STATIC and INT8_STATIC_SYM. It accepts bits from 0
up without an error; here a scheme that cannot work is refused, with advice, before any data is read.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import BaseModel, ValidationError

from lightning_compress.layers.matching import listed
from lightning_compress.quant.formats import has_global_scale, is_microscaled

__all__ = [
    "AUTO_SIZES", "GroupSize", "SizedByModule", "describe", "from_groups", "from_inline", "from_presets", "is_special",
    "no_group_order", "presets",
]  # fmt: skip

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
STATIC = {
    name: {
        "weights": QuantizationArgs(**_INT8, strategy="channel"),
        "input_activations": QuantizationArgs(**{**_INT8, "symmetric": symmetric}, strategy="tensor", dynamic=False),
    }
    for name, symmetric in (("INT8_STATIC", False), ("INT8_STATIC_SYM", True))
}
"""Presets of this package: what integer runtimes of vision models compute, with or without a zero point of inputs."""
NAMED = {**PRESET_SCHEMES, **STATIC}
BITS = range(2, 9)
AUTO_SIZES = (128, 64, 32, -1)
"""What ``group_size="auto"`` tries. Groups of 16 would store 2 bits more for each weight where scales are float32."""

GroupSize = int | Literal["auto"] | list[int]
"""Columns that share a scale; -1: all of a row; several: the first that divides a module's columns; ``auto``: of
:data:`AUTO_SIZES`."""


class SizedByModule(QuantizationScheme):
    """A scheme whose weights get their group size module by module; :func:`assign` gives each module a plain scheme.

    Args:
        sizes: The first one that divides the columns of a module is used; -1 means one scale per row.
    """

    sizes: tuple[int, ...]

    def sized(self, columns: int) -> QuantizationScheme:
        """The scheme for a module with this many columns; the first size where none divides them."""
        size = next((size for size in self.sizes if size == -1 or columns % size == 0), self.sizes[0])
        fields = {name: getattr(self, name) for name in QuantizationScheme.model_fields}
        return QuantizationScheme(**{**fields, "weights": _grouped(self.weights, size)})


def from_presets(
    scheme: str | Mapping[str, str | Sequence[str]], targets: Sequence[str], group_size: GroupSize | None = None
) -> list[QuantizationScheme]:
    """Schemes from a preset name (for ``targets``), or from a mapping of preset names to targets.

    Args:
        scheme: ``"W4A16"``, or ``{"W4A16": ["Linear"], "W8A16": ["re:.*down_proj"]}``.
        targets: Targets of a plain preset name.
        group_size: Takes the place of the preset's; ``"auto"`` leaves presets without groups as they are.

    Raises:
        ValueError: A preset is unknown (near misses are listed), or not supported.
    """
    named = {scheme: targets} if isinstance(scheme, str) else scheme
    if not named:
        raise ValueError("scheme={} holds no preset; write {'W4A16': ['Linear']}")
    for name, entry in named.items():
        if not isinstance(entry, str | Sequence):
            raise ValueError(f"scheme[{name!r}] is {entry!r}, expected targets, such as ['Linear']")
    return [_preset(name, listed(t), group_size) for name, t in named.items()]


def from_inline(scheme: Mapping[str, Any], targets: Sequence[str]) -> list[QuantizationScheme]:
    """The one scheme that is spelled out: ``{"weights": {"num_bits": 4, ...}, "input_activations": ...}``.

    Raises:
        ValueError: As in :func:`from_groups`.
    """
    parsed = _parse("scheme", {"targets": targets, **scheme})
    if fault := _fault(parsed):
        raise ValueError(f"scheme: {fault}")
    return [parsed]


def from_groups(groups: Mapping[str, Any]) -> list[QuantizationScheme]:
    """Schemes from ``config_groups``: name -> scheme, or preset name -> targets.

    Raises:
        ValueError: An unknown key (near misses are listed), a value that is wrong, or a scheme that is not supported.
    """
    if not groups:
        raise ValueError("config_groups is empty; write {'g': {'targets': ['Linear'], 'weights': {'num_bits': 4}}}")
    return [_group(name, group) for name, group in groups.items()]


def presets() -> list[str]:
    """Names of the presets that work here, in the order of compressed-tensors, then those of this package."""
    return [name for name in NAMED if not _fault(_named(name, ["Linear"]))]


def describe(scheme: QuantizationScheme) -> str:
    """One line for reports: ``W4A16 g64 sym``, ``W8A8 channel sym``, ``FP8 channel``, ``NVFP4A16 g16``."""
    weights, inputs = scheme.weights, scheme.input_activations
    wide = "16" if inputs is None else str(inputs.num_bits) if inputs.type == "int" else f"fp{inputs.num_bits}"
    grain = f"g{weights.group_size}" if weights.group_size else _strategy(weights)
    if isinstance(scheme, SizedByModule):
        grain = "/".join("channel" if size == -1 else f"g{size}" for size in scheme.sizes)
    if weights.block_structure is not None:
        grain = "x".join(map(str, weights.block_structure))
    static = " static" if inputs is not None and not inputs.dynamic else ""
    if is_microscaled(weights):
        kind = "NV" if has_global_scale(weights) else "MX"
        return f"{kind}FP{weights.num_bits}A{wide.removeprefix('fp')} {grain}"
    if weights.type == "float":
        return f"FP8 {grain}{static}"
    return f"W{weights.num_bits}A{wide} {grain} {'sym' if weights.symmetric else 'asym'}{static}"


def is_special(scheme: QuantizationScheme) -> bool:
    """True for formats whose scales have a format of their own (NVFP4, MXFP4 ...) or are shared by blocks."""
    args = [a for a in (scheme.weights, scheme.input_activations) if a is not None]
    return any(is_microscaled(a) or a.block_structure is not None for a in args)


def _preset(name: str, targets: list[str], group_size: GroupSize | None) -> QuantizationScheme:
    if name.upper() not in NAMED:
        near = get_close_matches(name.upper(), NAMED, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(presets())}"
        if name.upper().startswith("W16"):
            hint = "16 bits is not a quantization: leave these modules out of targets, or add them to ignore"
        raise ValueError(f"unknown scheme {name!r}; {hint}")
    scheme = _named(name, targets)
    if fault := _fault(scheme):
        raise ValueError(f"scheme {name!r}: {fault}; presets that work here: {', '.join(presets())}")
    return scheme if group_size is None else _regrouped(scheme, name, group_size)


def _named(name: str, targets: list[str]) -> QuantizationScheme:
    fields = STATIC.get(name.upper())
    if fields is None:
        return preset_name_to_scheme(name, targets)
    return QuantizationScheme(targets=targets, **{key: args.model_copy(deep=True) for key, args in fields.items()})


def _regrouped(scheme: QuantizationScheme, name: str, group_size: GroupSize) -> QuantizationScheme:
    is_integer = scheme.weights.type == "int"
    if group_size == "auto" and not (is_integer and _strategy(scheme.weights) == "group"):
        return scheme
    if not is_integer:
        raise ValueError(f"group_size={group_size} does not apply to {name!r}, which has no integers; leave it out")
    return _with_sizes(scheme, group_size)


def _with_sizes(scheme: QuantizationScheme, group_size: GroupSize) -> QuantizationScheme:
    """The scheme with another group size, or with several to choose from."""
    sizes = AUTO_SIZES if group_size == "auto" else group_size if isinstance(group_size, list) else [group_size]
    if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or (s != -1 and s < 1) for s in sizes):
        raise ValueError(
            f"group_size={group_size!r} must be positive, or -1 for one scale per row; or 'auto'; or a list of sizes, "
            f"of which each module gets the first that divides its columns, such as [64, 32, -1]"
        )
    weights = _grouped(scheme.weights, int(sizes[0]))
    if len(sizes) == 1:
        return scheme.model_copy(update={"weights": weights})
    fields = {name: getattr(scheme, name) for name in QuantizationScheme.model_fields}
    return SizedByModule(**{**fields, "weights": weights}, sizes=tuple(sizes))


def _grouped(weights: QuantizationArgs, size: int) -> QuantizationArgs:
    """The same grid with ``size`` columns to a scale, or with one scale per row (-1)."""
    rows = size == -1
    grain = {"strategy": "channel" if rows else "group", "group_size": None if rows else size}
    fields = weights.model_dump(exclude_unset=True)
    return QuantizationArgs(**{**fields, **grain, **({"actorder": None} if rows else {})})


def _group(name: str, group: Any) -> QuantizationScheme:
    where = f"config_groups[{name!r}]"
    if isinstance(group, QuantizationScheme):
        scheme = group.model_copy(deep=True)
    elif isinstance(group, str) or (isinstance(group, Sequence) and all(isinstance(t, str) for t in group)):
        return _preset(name, listed(group), None)
    elif isinstance(group, Mapping):
        scheme = _parse(where, group)
    else:
        raise ValueError(f"{where} must be a mapping with targets and weights, or a list of targets, got {group!r}")
    if not scheme.targets:
        raise ValueError(f"{where}: targets is empty; name the modules that it applies to, such as ['Linear']")
    if fault := _fault(scheme):
        raise ValueError(f"{where}: {fault}")
    return scheme


def _parse(where: str, group: Mapping[str, Any]) -> QuantizationScheme:
    _check_keys(where, group, QuantizationScheme)
    if "targets" not in group:
        raise ValueError(f"{where}: targets is missing; name the modules that it applies to, such as ['Linear']")
    targets = group["targets"]
    if not isinstance(targets, str | Sequence) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where}: targets is {targets!r}, expected names, patterns or classes, such as ['Linear']")
    fields: dict[str, Any] = {**group, "targets": listed(targets)}
    sizes = None
    weights = group.get("weights")
    if isinstance(weights, Mapping) and isinstance(weights.get("group_size"), str | list):
        sizes = weights["group_size"]
        fields["weights"] = {**weights, "group_size": AUTO_SIZES[0]}
        if weights.get("strategy", "group") != "group" or weights.get("type", "int") != "int":
            raise ValueError(f"{where}.weights: group_size={sizes!r} needs type: int and strategy: group")
        if isinstance(sizes, str) and sizes != "auto":
            raise ValueError(f"{where}.weights: group_size={sizes!r}, expected a number, a list of numbers or 'auto'")
    for name in ("weights", "input_activations", "output_activations"):
        if fields.get(name) is not None:
            fields[name] = _parse_args(f"{where}.{name}", fields[name])
    try:
        scheme = QuantizationScheme(**fields)
        return scheme if sizes is None else _with_sizes(scheme, sizes)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {_plain(error)}") from error


def _parse_args(where: str, fields: Any) -> QuantizationArgs:
    if isinstance(fields, QuantizationArgs):
        return fields
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} must be a mapping such as {{num_bits: 4, group_size: 64}}, got {fields!r}")
    _check_keys(where, fields, QuantizationArgs)
    for key in ("num_bits", "group_size"):
        if isinstance(fields.get(key), bool):
            raise ValueError(f"{where}: {key}={fields[key]}: expected a number")
    order = fields.get("actorder")
    if isinstance(order, str) and order.lower() in ("group", "dynamic"):
        raise ValueError(f"{where}: {no_group_order(order)}")
    try:
        return QuantizationArgs(**fields)
    except (ValidationError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{where}: {_plain(error)}") from error


def no_group_order(order: str) -> str:
    """Why ``actorder=group`` is refused."""
    return (
        f"actorder={order!r} is not available: compressed-tensors 0.20 dropped it with its weight_g_idx tensor (August "
        f"2026), so that no reader could load the result; use 'static', which loads everywhere and comes close"
    )


def _check_keys(where: str, fields: Mapping[str, Any], model: type[BaseModel]) -> None:
    for key in fields:
        if key not in model.model_fields:
            near = get_close_matches(str(key), model.model_fields, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(model.model_fields)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _fault(scheme: QuantizationScheme) -> str | None:
    """Why a scheme is not supported, or None."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        return "it quantizes no weights; give weights such as {num_bits: 4, group_size: 64}"
    for name, args in (("weights", weights), ("input_activations", inputs)):
        if args is not None and (fault := _bits_fault(args)):
            return f"{name}: {fault}"
    if scheme.output_activations is not None:
        return "output_activations are not supported; leave them out, or quantize the input of the next layer"
    if weights.dynamic:
        return "weights: dynamic applies to activations only"
    strategies = ("tensor", "channel", "group") if weights.type == "int" else ("tensor", "channel", "group", "block")
    if not is_microscaled(weights) and _strategy(weights) not in strategies:
        known, kind = ", ".join(strategies), QuantizationType(weights.type).value
        return f"weights: strategy {_strategy(weights)!r} is not supported for {kind}; use one of {known}"
    if inputs is not None and not inputs.dynamic and _strategy(inputs) != "tensor":
        return f"input_activations: static ones are per tensor, got strategy {_strategy(inputs)!r}; or dynamic: true"
    return None


def _strategy(args: QuantizationArgs) -> str:
    """The name of the strategy; the field may hold the enum or its value."""
    return QuantizationStrategy(args.strategy).value


def _bits_fault(args: QuantizationArgs) -> str | None:
    if args.type == "float":
        grain = (args.num_bits, _strategy(args), args.group_size)
        nvfp4 = grain == (4, "tensor_group", 16) and args.scale_dtype == torch.float8_e4m3fn
        mx = grain in ((4, "group", 32), (6, "group", 32), (8, "group", 32)) and args.scale_dtype == torch.uint8
        plain = args.num_bits == 8 and args.scale_dtype is None and _strategy(args) != "tensor_group"
        if not args.symmetric or not (nvfp4 or mx or plain):
            return (
                f"this {args.num_bits}-bit float format is not supported; expected FP8 with plain scales, NVFP4 "
                f"(num_bits 4, strategy tensor_group, group_size 16, scale_dtype torch.float8_e4m3fn) or MXFP4, 6, 8 "
                f"(strategy group, group_size 32, scale_dtype torch.uint8), symmetric; their presets spell them out"
            )
        return None
    if args.scale_dtype is not None:
        return f"scale_dtype={args.scale_dtype} belongs to float formats (NVFP4, MXFP4, MXFP6, MXFP8); leave it out"
    if args.num_bits == 16:
        return "num_bits=16 is not a quantization; leave this part out, or add the modules to ignore"
    if args.num_bits not in BITS:
        return f"num_bits={args.num_bits} is outside of {BITS.start}..{BITS.stop - 1}"
    return None


def _plain(error: Exception) -> str:
    """A pydantic error without its frame: ``num_bits: Input should be a valid integer``."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
