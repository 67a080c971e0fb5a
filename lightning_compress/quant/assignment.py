"""One scheme for each module: which scheme of the recipe it gets, with which group size, and whether that can work."""

import math
import warnings
from collections.abc import Mapping, Sequence

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.finite import check_finite
from lightning_compress.layers.matching import match_rank, select_weights, shortlist, warn_of_left_out
from lightning_compress.layers.matrix import (
    CONVOLUTIONS,
    SUPPORTED,
    as_matrix,
    check_weights_work,
    is_embedding,
    is_supported,
    parameter_of,
)
from lightning_compress.layers.module_weights import ModuleWeight
from lightning_compress.layers.tied_weights import owners_of, shared_message
from lightning_compress.layers.weight_slice import owner_of
from lightning_compress.quant.embeddings import Embeddings, check_embeddings, is_one_table
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import SizedByModule, is_special

__all__ = ["GroupSizeError", "assign", "group_fits"]


def assign(
    model: nn.Module, schemes: Sequence[QuantizationScheme], ignore: Sequence[str], embeddings: Embeddings = "refused"
) -> dict[str, QuantizationScheme]:
    """The scheme of each module, by dotted name: an exact name beats a pattern, a pattern a class, then the first wins.

    Raises:
        ValueError: Targets match nothing, everything is ignored, a pattern is not a regular expression, a layer cannot
            be quantized, its weight is shared, holds NaN or Inf, is quantized already, or its columns do not divide
            into groups. The message names the modules.
    """
    _check_dense(model)
    ranked: dict[str, tuple[int, QuantizationScheme]] = {}
    modules: dict[str, nn.Module] = {}
    for scheme in schemes:
        for name, module in select_weights(model, scheme.targets, ignore).items():
            modules[name] = module
            rank = max(match_rank(name, module, target) for target in scheme.targets)
            if name not in ranked or rank > ranked[name][0]:
                ranked[name] = (rank, scheme)
    assigned = {name: ranked[name][1] for name in modules}
    _check_modules(model, modules, assigned, embeddings)
    assigned = _sized(modules, assigned)
    for scheme in {id(s): s for s in assigned.values()}.values():
        group_fits({n: as_matrix(modules[n]).shape[1] for n, s in assigned.items() if s is scheme}, scheme)
    _check_grouped_inputs(modules, assigned)
    _check_weights_alone(modules, assigned)
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
            scheme = sized.setdefault((id(scheme), plain.weights.group_size), plain)
        assigned[name] = scheme
    return assigned


class GroupSizeError(ValueError):
    """A group size that does not divide the columns of a module of ``scheme``; ``size`` (None: none) fits all."""

    def __init__(self, message: str, scheme: QuantizationScheme, size: int | None):
        super().__init__(message)
        self.scheme, self.size = scheme, size


def group_fits(columns: Mapping[str, int], scheme: QuantizationScheme) -> None:
    """ValueError names the modules whose columns do not divide into groups, and a size that fits all of them."""
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
            f"{shortlist([f'{n!r} ({c})' for n, c in misfits.items()])}; {advice}, or add them to ignore",
            scheme,
            fits,
        )


def _fitting(size: int, common: int) -> int:
    """The largest usual group size below ``size`` that divides all columns, or -1."""
    return next((d for d in (64, 32, 16) if d < size and common % d == 0), -1)


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
    quantized = [repr(n) for n, m in model.named_modules() if Quantized.of(m) is not None or schemes[n] is not None]
    if quantized:
        raise ValueError(f"the model is quantized already, in {shortlist(quantized)}{again}{anew}")


def _check_modules(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    schemes: Mapping[str, QuantizationScheme],
    embeddings: Embeddings,
) -> None:
    check_weights_work(modules, "quantize")
    tables = {n for n, m in modules.items() if is_embedding(m)}
    odd = {n: m for n, m in modules.items() if not is_supported(m) and (n not in tables or embeddings == "refused")}
    named = shortlist([f"{n!r} ({type(m).__name__})" for n, m in odd.items()])
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
        held = owners.get(id(parameter_of(module)), {})
        inside = set(owner_of(module).modules())  # its parametrizations
        others = [n for n, owner in held.items() if owner not in inside]
        if others and not (embeddings == "shared" and is_one_table(held.values(), modules, schemes)):
            raise ValueError(shared_message(name, others, [n for n, m in modules.items() if m in held.values()]))
    check_finite(modules)


def _check_grouped_inputs(modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]) -> None:
    """ValueError names convolutions whose inputs would be cut into groups along the last dimension, the width."""
    inputs = {n: scheme.input_activations for n, scheme in schemes.items() if isinstance(modules[n], CONVOLUTIONS)}
    grouped = [repr(n) for n, args in inputs.items() if args is not None and args.group_size]
    if grouped:
        raise ValueError(
            f"input_activations: groups of columns do not exist in the inputs of {shortlist(grouped)}; convolutions "
            f"take one scale per sample (W8A8, FP8_DYNAMIC) or one for all (FP8); choose another scheme for them, or "
            f"add them to ignore"
        )


def _check_weights_alone(modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]) -> None:
    """ValueError names weights of recurrent modules and attentions whose inputs would be quantized."""
    inside = [n for n, m in modules.items() if isinstance(m, ModuleWeight) and schemes[n].input_activations is not None]
    if inside:
        kinds = sorted({type(m.home).__name__ for m in modules.values() if isinstance(m, ModuleWeight)})
        raise ValueError(
            f"the scheme quantizes the inputs of {shortlist(map(repr, inside))}, which {' and '.join(kinds)} multiply "
            f"inside of one operation of torch; choose a scheme of weights alone for them, such as W8A16, with "
            f"config_groups, or add them to ignore"
        )


def _warn_of_unseen_inputs(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls it: no hook sees its input."""
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    outputs = {f"{name}.out_proj".removeprefix(".") for name in attentions}
    unseen = [repr(n) for n, scheme in schemes.items() if n in outputs and scheme.input_activations is not None]
    if unseen:
        warnings.warn(
            f"the inputs of {shortlist(unseen)} will stay as they are: nn.MultiheadAttention uses the weight of its "
            f"out_proj without calling it; its weight alone is quantized, or add it to ignore",
            stacklevel=3,
        )
