"""From what the user wrote (preset names, config_groups, targets, ignore) to one checked scheme per module.

Schemes and presets are those of compressed-tensors. It accepts bits from 0 up, in silence; here what cannot work is
refused, with what to do, before any data is read.
"""

import math
import warnings
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
from torch import nn

from lightning_compress.layers.matching import match_rank, select_weights, warn_of_left_out
from lightning_compress.layers.matrix import (
    CONVOLUTIONS,
    SUPPORTED,
    as_matrix,
    check_weights_work,
    is_embedding,
    is_supported,
    weight_of,
)
from lightning_compress.layers.tied_weights import owners_of, shared_message
from lightning_compress.quant.embeddings import Embeddings, check_embeddings, is_one_table
from lightning_compress.quant.formats import has_global_scale, is_microscaled
from lightning_compress.quant.record import Quantized

__all__ = [
    "AUTO_SIZES", "GroupSize", "GroupSizeError", "SizedByModule", "assign", "describe", "from_groups", "from_inline",
    "from_presets", "group_fits", "is_special", "presets",
]  # fmt: skip

BITS = range(2, 9)
AUTO_SIZES = (128, 64, 32, -1)
"""What ``group_size="auto"`` tries. Groups of 16 would store 2 bits more for each weight where scales are float32."""

GroupSize = int | Literal["auto"] | list[int]
"""Columns that share a scale; -1: all of a row; several: the first that divides a module's columns; ``auto``: of
:data:`AUTO_SIZES`."""


class SizedByModule(QuantizationScheme):
    """A scheme whose weights get their group size module by module; :func:`assign` gives each module a plain scheme.

    Args:
        sizes: The first that divides a module's columns counts; -1 for one scale per row.
    """

    sizes: tuple[int, ...]

    def sized(self, columns: int) -> QuantizationScheme:
        """The scheme of a module with so many columns; where no size divides them, that of the first size."""
        size = next((size for size in self.sizes if size == -1 or columns % size == 0), self.sizes[0])
        fields = {name: getattr(self, name) for name in QuantizationScheme.model_fields}
        assert self.weights is not None
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
    for name, given in named.items():
        if not isinstance(given, str | Sequence):
            raise ValueError(f"scheme[{name!r}] is {given!r}, expected targets, such as ['Linear']")
    return [_preset(name, _listed(t), group_size) for name, t in named.items()]


def from_inline(scheme: Mapping[str, Any], targets: Sequence[str]) -> list[QuantizationScheme]:
    """The one scheme that is spelled out: ``{"weights": {"num_bits": 4, ...}, "input_activations": ...}``.

    Raises:
        ValueError: As in :func:`from_groups`.
    """
    made = _parse("scheme", {"targets": targets, **scheme})
    if fault := _fault(made):
        raise ValueError(f"scheme: {fault}")
    return [made]


def from_groups(groups: Mapping[str, Any]) -> list[QuantizationScheme]:
    """Schemes from ``config_groups``: name -> scheme, or preset name -> targets.

    Raises:
        ValueError: An unknown key (near misses are listed), a value that is wrong, or a scheme that is not supported.
    """
    if not groups:
        raise ValueError("config_groups is empty; write {'g': {'targets': ['Linear'], 'weights': {'num_bits': 4}}}")
    return [_group(name, group) for name, group in groups.items()]


def presets() -> list[str]:
    """Names of the presets that work here, in the order of compressed-tensors."""
    return [name for name in PRESET_SCHEMES if not _fault(preset_name_to_scheme(name, ["Linear"]))]


def assign(
    model: nn.Module,
    schemes: Sequence[QuantizationScheme],
    ignore: Sequence[str],
    embeddings: Embeddings = "refused",
) -> dict[str, QuantizationScheme]:
    """Each module's scheme, by dotted name: an exact name beats a pattern, a pattern a class; then the first one wins.

    Args:
        model: Names are relative to it.
        schemes: In the order of the recipe, with their targets.
        ignore: Class names, dotted names, ``re:`` patterns of what is left out.
        embeddings: What becomes of embeddings among the targets.

    Raises:
        ValueError: Targets match nothing, everything is ignored, a pattern is no regular expression, a layer cannot be
            quantized, its weight is shared, holds NaN or Inf, is quantized already, or its columns do not divide into
            groups. The message names the modules.
    """
    _check_dense(model)
    chosen: dict[str, tuple[int, QuantizationScheme]] = {}
    modules: dict[str, nn.Module] = {}
    for scheme in schemes:
        for name, module in select_weights(model, scheme.targets, ignore).items():
            modules[name] = module
            rank = max(match_rank(name, module, target) for target in scheme.targets)
            if name not in chosen or rank > chosen[name][0]:
                chosen[name] = (rank, scheme)
    assigned = {name: chosen[name][1] for name in modules}
    _check_modules(model, modules, assigned, embeddings)
    assigned = _sized(modules, assigned)
    for scheme in {id(s): s for s in assigned.values()}.values():
        group_fits({n: as_matrix(modules[n]).shape[1] for n, s in assigned.items() if s is scheme}, scheme)
    _check_grouped_inputs(modules, assigned)
    _warn_of_unseen_inputs(model, assigned)
    warn_of_left_out(model, modules, [target for scheme in schemes for target in scheme.targets], ignore)
    return assigned


def _sized(
    modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, QuantizationScheme]:
    """The schemes with a group size for each module; modules of one scheme and size share one object."""
    sized: dict[tuple[int, int | None], QuantizationScheme] = {}
    assigned = {}
    for name, scheme in schemes.items():
        if isinstance(scheme, SizedByModule):
            plain = scheme.sized(as_matrix(modules[name]).shape[1])
            assert plain.weights is not None
            scheme = sized.setdefault((id(scheme), plain.weights.group_size), plain)
        assigned[name] = scheme
    return assigned


class GroupSizeError(ValueError):
    """A group size that does not divide the columns of a module.

    Args:
        message: What came, and what to do.
        scheme: Whose group size it is.
        size: One that fits all modules of the scheme; None where it has no other.
    """

    def __init__(self, message: str, scheme: QuantizationScheme, size: int | None):
        super().__init__(message)
        self.scheme, self.size = scheme, size


def group_fits(columns: Mapping[str, int], scheme: QuantizationScheme) -> None:
    """ValueError names the modules whose columns do not divide into groups, and a size that fits all of them.

    Args:
        columns: Input columns by module.
        scheme: Theirs.
    """
    assert scheme.weights is not None
    for args in (scheme.weights, scheme.input_activations):
        size = 0 if args is None else args.group_size or 0
        misfits = {n: c for n, c in columns.items() if size > 0 and c % size}
        if not misfits:
            continue
        inputs = args is not scheme.weights
        fits = None if is_special(scheme) or inputs else _fitting(size, math.gcd(*columns.values()))
        advice = "the format knows no other size: choose another scheme for them"
        if fits is not None:
            one = f"group_size={fits}" if fits != -1 else "group_size=-1 (one scale per row)"
            advice = f"use {one}, group_size='auto' (each module gets what fits it)"
        what = "is larger than" if all(c < size for c in misfits.values()) else "does not divide"
        raise GroupSizeError(
            f"{'input_activations: ' if inputs else ''}group_size={size} {what} the input columns of "
            f"{_named([f'{n!r} ({c})' for n, c in misfits.items()])}; {advice}, or add them to ignore",
            scheme,
            fits,
        )


def _fitting(size: int, common: int) -> int:
    """The largest usual group size below ``size`` that divides all columns, or -1."""
    return next((d for d in (64, 32, 16) if d < size and common % d == 0), -1)


def describe(scheme: QuantizationScheme) -> str:
    """One line for reports: ``W4A16 g64 sym``, ``W8A8 channel sym``, ``FP8 channel``, ``NVFP4A16 g16``."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
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
    if name.upper() not in PRESET_SCHEMES:
        near = get_close_matches(name.upper(), PRESET_SCHEMES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(presets())}"
        if name.upper().startswith("W16"):
            hint = "16 bits is no quantization: leave these modules out of targets, or add them to ignore"
        raise ValueError(f"unknown scheme {name!r}; {hint}")
    scheme = preset_name_to_scheme(name, targets)
    if fault := _fault(scheme):
        raise ValueError(f"scheme {name!r}: {fault}; presets that work here: {', '.join(presets())}")
    return scheme if group_size is None else _regrouped(scheme, name, group_size)


def _regrouped(scheme: QuantizationScheme, name: str, group_size: GroupSize) -> QuantizationScheme:
    assert scheme.weights is not None
    is_integer = scheme.weights.type == "int"
    if group_size == "auto" and not (is_integer and _strategy(scheme.weights) == "group"):
        return scheme
    if not is_integer:
        raise ValueError(f"group_size={group_size} does not apply to {name!r}, which has no integers; leave it out")
    return _with_sizes(scheme, group_size)


def _with_sizes(scheme: QuantizationScheme, group_size: GroupSize) -> QuantizationScheme:
    """The scheme with another group size, or with several to choose from."""
    assert scheme.weights is not None
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
    given = weights.model_dump(exclude_unset=True)
    return QuantizationArgs(**{**given, **grain, **({"actorder": None} if rows else {})})


def _group(name: str, group: Any) -> QuantizationScheme:
    where = f"config_groups[{name!r}]"
    if isinstance(group, QuantizationScheme):
        scheme = group.model_copy(deep=True)
    elif isinstance(group, str) or (isinstance(group, Sequence) and all(isinstance(t, str) for t in group)):
        return _preset(name, _listed(group), None)
    elif isinstance(group, Mapping):
        scheme = _parse(where, group)
    else:
        raise ValueError(f"{where} must be a mapping with targets and weights, or a list of targets, got {group!r}")
    if not scheme.targets:
        raise ValueError(f"{where}: targets is empty; name what it shall apply to, such as ['Linear']")
    if fault := _fault(scheme):
        raise ValueError(f"{where}: {fault}")
    return scheme


def _parse(where: str, group: Mapping[str, Any]) -> QuantizationScheme:
    _known_keys(where, group, QuantizationScheme)
    if "targets" not in group:
        raise ValueError(f"{where}: targets is missing; name what it shall apply to, such as ['Linear']")
    targets = group["targets"]
    if not isinstance(targets, str | Sequence) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where}: targets is {targets!r}, expected names, patterns or classes, such as ['Linear']")
    fields: dict[str, Any] = {**group, "targets": _listed(targets)}
    sizes = None
    if isinstance(given := group.get("weights"), Mapping) and isinstance(given.get("group_size"), str | list):
        sizes = given["group_size"]
        fields["weights"] = {**given, "group_size": AUTO_SIZES[0]}
        if given.get("strategy", "group") != "group" or given.get("type", "int") != "int":
            raise ValueError(f"{where}.weights: group_size={sizes!r} needs type: int and strategy: group")
        if isinstance(sizes, str) and sizes != "auto":
            raise ValueError(f"{where}.weights: group_size={sizes!r}, expected a number, a list of numbers or 'auto'")
    for part in ("weights", "input_activations", "output_activations"):
        given = fields.get(part)
        if given is None or isinstance(given, QuantizationArgs):
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}.{part} must be a mapping such as {{num_bits: 4, group_size: 64}}, got {given!r}")
        _known_keys(f"{where}.{part}", given, QuantizationArgs)
        for key in ("num_bits", "group_size"):
            if isinstance(given.get(key), bool):
                raise ValueError(f"{where}.{part}: {key}={given[key]}: expected a number")
        order = given.get("actorder")
        if isinstance(order, str) and order.lower() in ("group", "dynamic"):
            raise ValueError(f"{where}.{part}: {no_group_order(order)}")
        try:
            fields[part] = QuantizationArgs(**given)
        except (ValidationError, NotImplementedError, TypeError) as error:
            raise ValueError(f"{where}.{part}: {_plain(error)}") from error
    try:
        scheme = QuantizationScheme(**fields)
        return scheme if sizes is None else _with_sizes(scheme, sizes)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {_plain(error)}") from error


def no_group_order(order: str) -> str:
    """Why ``actorder=group`` is refused."""
    return (
        f"actorder={order!r} is not available: compressed-tensors 0.20 dropped it with its weight_g_idx tensor (August "
        f"2026), so that no reader could load the result; use 'static', which loads everywhere and comes close"
    )


def _known_keys(where: str, given: Mapping[str, Any], model: type[BaseModel]) -> None:
    for key in given:
        if key not in model.model_fields:
            near = get_close_matches(str(key), model.model_fields, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(model.model_fields)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _fault(scheme: QuantizationScheme) -> str | None:
    """Why a scheme is not supported, or None."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        return "it quantizes no weights; give weights such as {num_bits: 4, group_size: 64}"
    for part, args in (("weights", weights), ("input_activations", inputs)):
        if args is not None and (fault := _bits_fault(args)):
            return f"{part}: {fault}"
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
    """Its name: the field holds the enum or its value, depending on who set it."""
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
        return "num_bits=16 is no quantization; leave this part out, or add the modules to ignore"
    if args.num_bits not in BITS:
        return f"num_bits={args.num_bits} is outside of {BITS.start}..{BITS.stop - 1}"
    return None


def _check_dense(model: nn.Module) -> None:
    """ValueError when a model, or part of it, is quantized already."""
    again = "; quantizing twice adds up the errors of both: start from the dense model"
    anew = ", or call lightning_compress.dequantize(model) where its weights were trained or merged since"
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        method = method or "see model.config.quantization_config"
        raise ValueError(f"the model is quantized already ({getattr(method, 'value', method)}){again}")
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    done = [repr(n) for n, m in model.named_modules() if Quantized.of(m) is not None or schemes[n] is not None]
    if done:
        raise ValueError(f"the model is quantized already, in {_named(done)}{again}{anew}")


def _check_modules(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    schemes: Mapping[str, QuantizationScheme],
    embeddings: Embeddings,
) -> None:
    check_weights_work(modules, "quantize")
    tables = {n for n, m in modules.items() if is_embedding(m)}
    odd = {n: m for n, m in modules.items() if not is_supported(m) and (n not in tables or embeddings == "refused")}
    named = _named([f"{n!r} ({type(m).__name__})" for n, m in odd.items()])
    if any("weight" in getattr(m, "parametrizations", ()) for m in odd.values()):
        raise ValueError(
            f"cannot quantize {named}: a parametrization computes the weight; merge it first "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or add the modules to ignore"
        )
    if odd:
        more = " (embeddings: QuantizationModifier, GPTQModifier or QATModifier)" if tables & odd.keys() else ""
        raise ValueError(f"cannot quantize {named}: expected {SUPPORTED}{more}; narrow targets, or add them to ignore")
    check_embeddings(schemes, modules)
    owners = owners_of(model)
    for name, module in modules.items():
        held = owners.get(id(module.weight), {})
        others = [n for n, owner in held.items() if owner is not module]
        if others and not (embeddings == "shared" and is_one_table(held.values(), modules, schemes)):
            raise ValueError(shared_message(name, others, [n for n, m in modules.items() if m in held.values()]))
    check_finite(modules)


def _check_grouped_inputs(modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]) -> None:
    """ValueError names convolutions whose inputs would be cut into groups along the last dimension, the width."""
    inputs = {n: scheme.input_activations for n, scheme in schemes.items() if isinstance(modules[n], CONVOLUTIONS)}
    grouped = [repr(n) for n, args in inputs.items() if args is not None and args.group_size]
    if grouped:
        raise ValueError(
            f"input_activations: groups of columns do not exist in the inputs of {_named(grouped)}; convolutions "
            f"take one scale per sample (W8A8, FP8_DYNAMIC) or one for all (FP8); choose another scheme for them, or "
            f"add them to ignore"
        )


def _warn_of_unseen_inputs(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls it: no hook sees its input."""
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    outputs = {f"{name}.out_proj".removeprefix(".") for name in attentions}
    unseen = [repr(n) for n, scheme in schemes.items() if n in outputs and scheme.input_activations is not None]
    if unseen:
        warnings.warn(
            f"the inputs of {_named(unseen)} will stay as they are: nn.MultiheadAttention uses the weight of its "
            f"out_proj without calling it; its weight alone is quantized, or add it to ignore",
            stacklevel=3,
        )


def check_finite(modules: Mapping[str, nn.Module]) -> None:
    """ValueError names the modules whose weight holds NaN or Inf."""
    weights = {name: weight_of(module) for name, module in modules.items()}
    suspects = [n for n, w in weights.items() if not w.is_meta and not torch.isfinite(w.sum(dtype=torch.float32))]
    broken = [n for n in suspects if not weights[n].isfinite().all()]
    if broken:
        raise ValueError(f"the weight of {_named([repr(n) for n in broken])} holds NaN or Inf; did training diverge?")


def _named(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _listed(entries: str | Sequence[str]) -> list[str]:
    return [entries] if isinstance(entries, str) else list(entries)


def _plain(error: Exception) -> str:
    """A pydantic error without its frame: ``num_bits: Input should be a valid integer``."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
