"""Which channels of a source lead to which input channels of which units, measured by probing a block.

Each source in turn returns channel j times 2^e_j while all other units return what they returned before
(unit_probe.py). Where an input channel of a unit then is exactly 2^e times what it was, it comes from a channel of the
source with that e; a few runs with other exponents, the digits of j, show which one. This finds v_proj -> attention ->
o_proj with the repeated heads of GQA, up_proj -> gate -> down_proj, fc1 -> ReLU -> fc2, and the values of a fused qkv;
a residual, a softmax or a GELU shows, and the source is ruled out. Powers of two are exact in any floating dtype.

Shapes: R output channels of the source, J of them that are scaled, N tokens, C input channels of a consumer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.precision import model_precision
from lightning_compress.layers.matrix import is_transposed
from lightning_compress.modifiers.smoothing.fold import restored, scale_consumer, scale_source
from lightning_compress.modifiers.smoothing.pair import Consumer, Pair, SourceForm, shared_prefix
from lightning_compress.modifiers.smoothing.unit_probe import Recording, UnitCall, probe, relative_change

__all__ = ["sources_of", "trace"]

EXPONENTS = (-3, -2, -1, 1, 2, 3)  # a digit of a channel's number; none is 0, so that every run shows every channel
UNTOUCHED, UNKNOWN = -1, -2  # an input channel that the source does not feed; one that is always zero
CLOSE = 1e-5


def sources_of(recording: Recording, frozen: set[int]) -> Iterator[tuple[str, SourceForm]]:
    """Units that run once and whose output channels can be scaled, in the order of their calls.

    Args:
        recording: Recorded run of the block.
        frozen: ``id`` of parameters that must not change.
    """
    for name, calls in recording.calls.items():
        unit, output = recording.units[name], calls[0].output
        if len(calls) == 1 and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            if not _is_frozen(unit, frozen) and (form := _form(unit, calls[0])) is not None:
                yield name, form


def trace(
    recording: Recording,
    run: Callable[[], Any],
    source: str,
    form: SourceForm,
    frozen: set[int],
    head_counts: Sequence[int] = (),
) -> Pair | None:
    """The pair of a source; None where a scale of the source cannot be undone in all that it feeds.

    Args:
        recording: Recorded run of the block.
        run: Puts the recorded batch through the block again.
        source: Name of the unit that is the source.
        form: How the source holds its scale.
        frozen: ``id`` of parameters that must not change.
        head_counts: Numbers of heads that the block may have. Of a fused qkv only some channels can be scaled: the
            last ones, the first ones, or the last ones of each head.
    """
    output = recording.calls[source][0].output
    R = output.shape[-1]
    channels_J = torch.arange(R, device=output.device)
    inputs, leaks = probe(recording, run, source, _factor(channels_J, R, 0))
    if not inputs:
        return None
    if leaks or any(_exponents(recording.calls[name], xs) is None for name, xs in inputs.items()):
        widths = [
            x.shape[-1] for name in inputs for call in recording.calls[name] if (x := call.main_input) is not None
        ]
        if form != "rows" or not widths or min(widths) >= R:  # not fused: it feeds nothing narrower
            return None
        if (scalable_J := _scalable_channels(recording, run, source, R, head_counts)) is None:
            return None
        channels_J = scalable_J
    indices = _indices(recording, run, source, channels_J, R)
    return None if indices is None else _paired(recording, source, form, channels_J, indices, frozen)


# -- what is a source -------------------------------------------------------------------------------------------------


def _form(unit: nn.Module, call: UnitCall) -> SourceForm | None:
    if isinstance(unit, nn.Linear) or is_transposed(unit):
        return "rows"
    parameters = dict(unit.named_parameters(recurse=False))
    R = call.output.shape[-1]
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"} or any(p.shape != (R,) for p in parameters.values()):
        return None
    channels = torch.arange(R, device=call.output.device)
    factor_R = _factor(channels, R, 0)
    forms: tuple[SourceForm, ...] = ("weight", "one_plus_weight")
    for form in forms:
        with restored(unit):
            scale_source(unit, form, channels, 1 / factor_R)
            with model_precision():  # as the recorded call was made
                scaled = unit(*call.args, **call.kwargs)
        # powers of two are exact; but (1 + w) / s - 1 is rounded to the dtype of w
        rounding = 8 * torch.finfo(parameters["weight"].dtype).eps if form == "one_plus_weight" else 0.0
        if relative_change(call.output * factor_R.to(call.output.dtype), scaled) <= max(CLOSE, rounding):
            return form
    return None


def _is_frozen(unit: nn.Module, frozen: set[int]) -> bool:
    return any(id(p) in frozen for p in unit.parameters(recurse=False))


# -- probing ----------------------------------------------------------------------------------------------------------


def _factor(channels_J: Tensor, R: int, digit: int) -> Tensor:
    """2^e_j for channel j = channels_J[i], e_j by a digit of i; 1 for all other channels, [R]."""
    digits = torch.arange(len(channels_J), device=channels_J.device) // len(EXPONENTS) ** digit % len(EXPONENTS)
    factor_R = torch.ones(R, device=channels_J.device, dtype=torch.float32)
    exponents = torch.tensor(EXPONENTS, device=channels_J.device, dtype=torch.float32)
    factor_R[channels_J] = torch.exp2(exponents[digits])
    return factor_R


def _exponents(calls: Sequence[UnitCall], xs: Sequence[Tensor | None]) -> Tensor | None:
    """e of each input channel with x_now = 2^e x_before, NaN where it is always zero; None where there is no such e."""
    merged: Tensor | None = None
    for call, now in zip(calls, xs, strict=True):
        before = call.main_input
        if now is None or before is None or before.ndim < 2:
            return None
        if now.numel() == 0:
            continue
        # exact but for float16's subnormals; a looser bound takes keys for values where scores hardly matter
        close = 1e-6 if before.dtype in (torch.float32, torch.float64) else 1e-4
        x_NC, y_NC = (t.reshape(-1, t.shape[-1]).float() for t in (before, now))
        e_C = _exponents_of(x_NC, y_NC, close)
        if e_C is None or (merged is not None and merged.shape != e_C.shape):
            return None
        if merged is not None:
            if ((merged != e_C) & ~merged.isnan() & ~e_C.isnan()).any():
                return None
            e_C = torch.where(e_C.isnan(), merged, e_C)
        merged = e_C
    return merged


def _exponents_of(before_NC: Tensor, now_NC: Tensor, close: float) -> Tensor | None:
    largest_C, row_C = before_NC.abs().max(0)
    alive_C = largest_C > 0
    ratio_C = (now_NC.gather(0, row_C[None]) / before_NC.gather(0, row_C[None]))[0]
    if not bool(((ratio_C > 0) & ratio_C.isfinite())[alive_C].all()):
        return None
    e_C = torch.where(alive_C, ratio_C.log2().round(), torch.nan)
    expected_NC = before_NC * torch.exp2(e_C.nan_to_num(0.0))
    close_C = (now_NC - expected_NC).abs().amax(0) <= close * expected_NC.abs().amax(0)
    return e_C if bool(close_C.all()) else None


def _indices(
    recording: Recording, run: Callable[[], Any], source: str, channels_J: Tensor, R: int
) -> dict[str, Tensor] | None:
    """For each input channel of each fed unit its index into ``channels_J``; None where a unit has no such index."""
    J, base, digit = len(channels_J), len(EXPONENTS), 0
    indices: dict[str, Tensor] = {}
    while digit == 0 or base**digit < J:
        inputs, leaks = probe(recording, run, source, _factor(channels_J, R, digit))
        if leaks or (digit and inputs.keys() != indices.keys()):
            return None
        for name, xs in inputs.items():
            if (e_C := _exponents(recording.calls[name], xs)) is None:
                return None
            digits_C = torch.full_like(e_C, torch.nan)
            for value, exponent in enumerate(EXPONENTS):
                digits_C[e_C == exponent] = value
            if (digits_C.isnan() & (e_C != 0) & ~e_C.isnan()).any():
                return None  # a product of channels, or a power
            index_C = (digits_C * base**digit).nan_to_num(0.0).long()
            index_C = torch.where(e_C.isnan(), UNKNOWN, torch.where(e_C == 0, UNTOUCHED, index_C))
            if digit:
                lower_C = indices[name]
                if ((lower_C < 0) != (index_C < 0)).any():
                    return None
                index_C = torch.where(index_C < 0, index_C, lower_C + index_C)
            indices[name] = index_C
        digit += 1
    if any((index_C >= J).any() for index_C in indices.values()):
        return None
    return {name: _filled(index_C, indices.values(), J) for name, index_C in indices.items()}


def _filled(index_C: Tensor, others: Any, J: int) -> Tensor:
    """Indices of channels that were always zero (a dead ReLU), by the pattern of the others or by another unit."""
    unknown_C, known_C = index_C == UNKNOWN, index_C >= 0
    if not unknown_C.any():
        return index_C
    filled_C = index_C.clone()
    for other_C in others:
        if other_C.shape == index_C.shape and bool((other_C == index_C)[known_C & (other_C >= 0)].all()):
            filled_C = torch.where((filled_C == UNKNOWN) & (other_C >= 0), other_C, filled_C)
    channel_C = torch.arange(len(index_C), device=index_C.device)
    shifts = (index_C - channel_C)[known_C].unique()
    if len(shifts) == 1:
        guess_C = channel_C + shifts[0]
        filled_C = torch.where((filled_C == UNKNOWN) & (guess_C >= 0) & (guess_C < J), guess_C, filled_C)
    return filled_C.clamp(min=UNTOUCHED)


def _scalable_channels(
    recording: Recording, run: Callable[[], Any], source: str, R: int, head_counts: Sequence[int]
) -> Tensor | None:
    """As many channels of a fused layer as scale: the last or first ones, or the last or first ones of each head."""

    def fits(channels_J: Tensor) -> bool:
        inputs, leaks = probe(recording, run, source, _factor(channels_J, R, 0))
        return not leaks and all(_exponents(recording.calls[name], xs) is not None for name, xs in inputs.items())

    device = recording.calls[source][0].output.device
    best = torch.arange(0, device=device)
    for heads in [1, *(h for h in dict.fromkeys(head_counts) if 1 < h < R and R % h == 0)]:
        channels_HD = torch.arange(R, device=device).view(heads, -1)
        for ordered_HD in (channels_HD, channels_HD.flip(1)):
            fails, fit = 0, ordered_HD.shape[1]  # all from ``fit`` on scale, all from ``fails`` on do not
            while fit - fails > 1:
                middle = (fails + fit) // 2
                fails, fit = (fails, middle) if fits(ordered_HD[:, middle:].flatten()) else (middle, fit)
            if heads * (ordered_HD.shape[1] - fit) > len(best):
                best = ordered_HD[:, fit:].flatten().sort().values
    return best if len(best) else None


# -- where a scale is undone ------------------------------------------------------------------------------------------


def _paired(
    recording: Recording,
    source: str,
    form: SourceForm,
    channels_J: Tensor,
    indices: Mapping[str, Tensor],
    frozen: set[int],
) -> Pair | None:
    used_J = torch.cat(list(indices.values())).unique() if indices else channels_J[:0]
    used_J = used_J[used_J >= 0]
    if not len(used_J):
        return None
    renumbered_J = torch.full_like(channels_J, UNTOUCHED)
    renumbered_J[used_J] = torch.arange(len(used_J), device=channels_J.device)
    consumers: dict[str, Consumer] = {}
    for name, old_C in indices.items():
        unit = recording.units[name]
        index_C = torch.where(old_C >= 0, renumbered_J[old_C.clamp(min=0)], UNTOUCHED)
        axes = None if _is_frozen(unit, frozen) else _axes(unit, recording.calls[name], index_C, len(used_J))
        if axes is None:
            return None
        consumers[name] = Consumer(axes, index_C)
    if not _add_silent(recording, source, consumers, frozen):
        return None
    return Pair(source, form, channels_J[used_J], consumers)


def _axes(unit: nn.Module, calls: Sequence[UnitCall], index_C: Tensor, J: int) -> dict[str, int] | None:
    """The axes of the parameters that run over input channels: a scale along them undoes one of x."""
    parameters = dict(unit.named_parameters(recurse=False))
    C = len(index_C)
    options = [[a for a in reversed(range(p.ndim)) if p.shape[a] == C] + [None] for p in parameters.values()]
    call = max(calls, key=lambda c: x.numel() if (x := c.main_input) is not None else 0)
    x = call.main_input
    assert x is not None
    exponents = torch.tensor(EXPONENTS, device=x.device, dtype=torch.float32)
    s_J = torch.exp2(exponents[torch.arange(J, device=x.device) % len(EXPONENTS)])
    divided = x / torch.where(index_C >= 0, s_J[index_C.clamp(min=0)], 1.0).to(x.dtype)
    args = tuple(divided if a is x else a for a in call.args)
    kwargs = {key: divided if value is x else value for key, value in call.kwargs.items()}
    for choice in sorted(product(*options), key=lambda axes: sum(a is not None for a in axes)):
        axes = {name: axis for name, axis in zip(parameters, choice, strict=True) if axis is not None}
        if axes:
            with restored(unit):
                scale_consumer(unit, Consumer(axes, index_C), s_J)
                with model_precision():
                    output = unit(*args, **kwargs)
            if relative_change(call.output, output) <= CLOSE:
                return axes
    return None


def _add_silent(recording: Recording, source: str, consumers: dict[str, Consumer], frozen: set[int]) -> bool:
    """Add experts that received no token of this batch like their siblings; False when one of them must not change."""
    silent = []
    for name in recording.units:
        inputs = [call.main_input for call in recording.calls.get(name, [])]
        if all(x is not None and not x.numel() for x in inputs):
            silent.append(name)
    for name, consumer in list(consumers.items()):
        for other in silent:
            if other in consumers or not _are_siblings(name, other, source):
                continue
            shapes = [
                {key: p.shape for key, p in recording.units[unit].named_parameters(recurse=False)}
                for unit in (name, other)
            ]
            if shapes[0] != shapes[1]:
                continue
            if _is_frozen(recording.units[other], frozen):
                return False
            consumers[other] = consumer
    return True


def _are_siblings(one: str, other: str, source: str) -> bool:
    """Whether two names differ in numbers alone, and only behind the prefix that the first shares with the source."""
    parts, other_parts = one.split("."), other.split(".")
    prefix = shared_prefix(one, source)
    if len(parts) != len(other_parts) or parts[:prefix] != other_parts[:prefix]:
        return False
    return all(a == b or (a.isdecimal() and b.isdecimal()) for a, b in zip(parts, other_parts, strict=True))
