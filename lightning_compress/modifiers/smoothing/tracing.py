"""Which channels of a source lead to which inputs of which units, found by probing a block as it is.

Each source in turn answers with channel j times 2^e_j while all units answer as before (units.py). Where a unit is then
given exactly 2^e times what it was given before, its channel comes from a channel of the source with that e; a few runs
with other exponents, the digits of j, tell which one. So v_proj -> attention -> o_proj is found with the repeated heads
of GQA, up_proj -> gate -> down_proj, fc1 -> ReLU -> fc2, and the values of a fused qkv; a residual, a softmax, a GELU
shows and rules the source out. Powers of two are exact in any floating dtype.

Shapes: R output channels of the source, J of them that are scaled, N tokens, C input channels of a consumer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers.matrix import is_transposed
from lightning_compress.modifiers.smoothing.fold import kept, scale_consumer, scale_source
from lightning_compress.modifiers.smoothing.pair import Consumer, Pair, SourceForm
from lightning_compress.modifiers.smoothing.units import Call, Recording, main_input, probe, relative_change

__all__ = ["sources_of", "trace"]

EXPONENTS = (-3, -2, -1, 1, 2, 3)  # a digit of a channel's number; none is 0, so that every run shows every channel
UNTOUCHED, UNKNOWN = -1, -2  # of an input channel: not fed by the source; always zero, so that nobody knows
CLOSE = 1e-5


def sources_of(recording: Recording, frozen: set[int]) -> Iterator[tuple[str, SourceForm]]:
    """Units that run once and whose output channels can be scaled, in the order of their calls.

    Args:
        recording: Of the block.
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
    """The pair of a source, or None: where what it feeds cannot all make up for a scale.

    Args:
        recording: Of the block.
        run: Puts the recorded batch through the block again.
        source: A unit.
        form: How it holds its scale.
        frozen: ``id`` of parameters that must not change.
        head_counts: Numbers of heads that may be in the block. Of a fused qkv only some channels can be scaled: the
            last ones, the first ones, or the last ones of each head.
    """
    output = recording.calls[source][0].output
    R = output.shape[-1]
    channels_J = torch.arange(R, device=output.device)
    given, leaks = probe(recording, run, source, _factor(channels_J, R, 0))
    if not given:
        return None
    if leaks or any(_exponents(recording.calls[name], xs) is None for name, xs in given.items()):
        widths = [x.shape[-1] for name in given for call in recording.calls[name] if (x := _main(call)) is not None]
        if form != "rows" or not widths or min(widths) >= R:  # not fused: it feeds nothing narrower
            return None
        some_J = _part_that_scales(recording, run, source, R, head_counts)
        if some_J is None:
            return None
        channels_J = some_J.to(output.device)
    indices = _indices(recording, run, source, channels_J, R)
    return None if indices is None else _paired(recording, source, form, channels_J, indices, frozen)


# -- what is a source -------------------------------------------------------------------------------------------------


def _form(unit: nn.Module, call: Call) -> SourceForm | None:
    if isinstance(unit, nn.Linear) or is_transposed(unit):
        return "rows"
    own = dict(unit.named_parameters(recurse=False))
    R = call.output.shape[-1]
    if "weight" not in own or own.keys() - {"weight", "bias"} or any(p.shape != (R,) for p in own.values()):
        return None
    channels = torch.arange(R, device=call.output.device)
    factor_R = _factor(channels, R, 0)
    forms: tuple[SourceForm, ...] = ("weight", "one_plus_weight")
    for form in forms:
        with kept(unit):
            scale_source(unit, form, channels, 1 / factor_R)
            scaled = unit(*call.args, **call.kwargs)
        if relative_change(call.output * factor_R.to(call.output.dtype), scaled) <= _tolerance(form, own["weight"]):
            return form
    return None


def _tolerance(form: SourceForm, weight: Tensor) -> float:
    """Powers of two are exact; but (1 + w) / s - 1 is rounded to the dtype of w."""
    return CLOSE if form != "one_plus_weight" else max(CLOSE, 8 * torch.finfo(weight.dtype).eps)


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


def _main(call: Call) -> Tensor | None:
    return main_input(call.args, call.kwargs)


def _exponents(calls: Sequence[Call], xs: Sequence[Tensor | None]) -> Tensor | None:
    """Per input channel the e with x_now = 2^e x_before, NaN where it is always zero; None where there is no such e."""
    merged: Tensor | None = None
    for call, now in zip(calls, xs, strict=True):
        before = _main(call)
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
    size_C, at_C = before_NC.abs().max(0)
    alive_C = size_C > 0
    ratio_C = (now_NC.gather(0, at_C[None]) / before_NC.gather(0, at_C[None]))[0]
    if not bool(((ratio_C > 0) & ratio_C.isfinite())[alive_C].all()):
        return None
    e_C = torch.where(alive_C, ratio_C.log2().round(), torch.nan)
    expected_NC = before_NC * torch.exp2(e_C.nan_to_num(0.0))
    close_C = (now_NC - expected_NC).abs().amax(0) <= close * expected_NC.abs().amax(0)
    return e_C if bool(close_C.all()) else None


def _indices(
    recording: Recording, run: Callable[[], Any], source: str, channels_J: Tensor, R: int
) -> dict[str, Tensor] | None:
    """Per fed unit and input channel the place in ``channels_J`` it comes from; None where that does not hold."""
    J, base, digit = len(channels_J), len(EXPONENTS), 0
    found: dict[str, Tensor] = {}
    while digit == 0 or base**digit < J:
        given, leaks = probe(recording, run, source, _factor(channels_J, R, digit))
        if leaks or (digit and given.keys() != found.keys()):
            return None
        for name, xs in given.items():
            if (e_C := _exponents(recording.calls[name], xs)) is None:
                return None
            digits_C = torch.full_like(e_C, torch.nan)
            for value, exponent in enumerate(EXPONENTS):
                digits_C[e_C == exponent] = value
            if (digits_C.isnan() & (e_C != 0) & ~e_C.isnan()).any():
                return None  # a product of channels, or a power
            place_C = (digits_C * base**digit).nan_to_num(0.0).long()
            place_C = torch.where(e_C.isnan(), UNKNOWN, torch.where(e_C == 0, UNTOUCHED, place_C))
            if digit:
                before_C = found[name]
                if ((before_C < 0) != (place_C < 0)).any():
                    return None
                place_C = torch.where(place_C < 0, place_C, before_C + place_C)
            found[name] = place_C
        digit += 1
    if any((index_C >= J).any() for index_C in found.values()):
        return None
    return {name: _filled(index_C, found.values(), J) for name, index_C in found.items()}


def _filled(index_C: Tensor, others: Any, J: int) -> Tensor:
    """Channels that were always zero (a dead ReLU) go where the pattern of the others, or another unit, puts them."""
    unknown_C, known_C = index_C == UNKNOWN, index_C >= 0
    if not unknown_C.any():
        return index_C
    filled_C = index_C.clone()
    for other_C in others:
        if other_C.shape == index_C.shape and bool((other_C == index_C)[known_C & (other_C >= 0)].all()):
            filled_C = torch.where((filled_C == UNKNOWN) & (other_C >= 0), other_C, filled_C)
    place_C = torch.arange(len(index_C), device=index_C.device)
    shifts = (index_C - place_C)[known_C].unique()
    if len(shifts) == 1:
        guess_C = place_C + shifts[0]
        filled_C = torch.where((filled_C == UNKNOWN) & (guess_C >= 0) & (guess_C < J), guess_C, filled_C)
    return filled_C.clamp(min=UNTOUCHED)


def _part_that_scales(
    recording: Recording, run: Callable[[], Any], source: str, R: int, head_counts: Sequence[int]
) -> Tensor | None:
    """The most channels of a fused layer that scale: the last ones, the first ones, the last or first of each head."""

    def fits(channels_J: Tensor) -> bool:
        given, leaks = probe(recording, run, source, _factor(channels_J, R, 0))
        return not leaks and all(_exponents(recording.calls[name], xs) is not None for name, xs in given.items())

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


# -- what makes up for a scale ----------------------------------------------------------------------------------------


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
    place_J = torch.full_like(channels_J, UNTOUCHED)
    place_J[used_J] = torch.arange(len(used_J), device=place_J.device)
    consumers: dict[str, Consumer] = {}
    for name, old_C in indices.items():
        unit = recording.units[name]
        index_C = torch.where(old_C >= 0, place_J[old_C.clamp(min=0)], UNTOUCHED)
        axes = None if _is_frozen(unit, frozen) else _axes(unit, recording.calls[name], index_C, len(used_J))
        if axes is None:
            return None
        consumers[name] = Consumer(axes, index_C)
    if not _add_silent(recording, source, consumers, frozen):
        return None
    return Pair(source, form, channels_J[used_J], consumers)


def _axes(unit: nn.Module, calls: Sequence[Call], index_C: Tensor, J: int) -> dict[str, int] | None:
    """The axes of the parameters that run over input channels: those along which a scale makes up for one of x."""
    own = dict(unit.named_parameters(recurse=False))
    C = len(index_C)
    options = [[a for a in reversed(range(p.ndim)) if p.shape[a] == C] + [None] for p in own.values()]
    call = max(calls, key=lambda c: x.numel() if (x := _main(c)) is not None else 0)
    x = _main(call)
    assert x is not None
    exponents = torch.tensor(EXPONENTS, device=x.device, dtype=torch.float32)
    s_J = torch.exp2(exponents[torch.arange(J, device=x.device) % len(EXPONENTS)])
    divided = x / torch.where(index_C >= 0, s_J[index_C.clamp(min=0)], 1.0).to(x.dtype)
    args = tuple(divided if a is x else a for a in call.args)
    kwargs = {key: divided if value is x else value for key, value in call.kwargs.items()}
    for choice in sorted(product(*options), key=lambda axes: sum(a is not None for a in axes)):
        axes = {name: axis for name, axis in zip(own, choice, strict=True) if axis is not None}
        if axes:
            with kept(unit):
                scale_consumer(unit, Consumer(axes, index_C), s_J)
                output = unit(*args, **kwargs)
            if relative_change(call.output, output) <= CLOSE:
                return axes
    return None


def _add_silent(recording: Recording, source: str, consumers: dict[str, Consumer], frozen: set[int]) -> bool:
    """Experts that got no token of this batch are fed as their siblings are; False when one of them must not change."""
    silent = [n for n in recording.units if all(_is_empty(call) for call in recording.calls.get(n, []))]
    for name, consumer in list(consumers.items()):
        for other in silent:
            if other not in consumers and _siblings(name, other, source):
                unit, model = recording.units[other], recording.units[name]
                shapes = [{n: p.shape for n, p in u.named_parameters(recurse=False)} for u in (unit, model)]
                if shapes[0] != shapes[1]:
                    continue
                if _is_frozen(unit, frozen):
                    return False
                consumers[other] = consumer
    return True


def _is_empty(call: Call) -> bool:
    x = _main(call)
    return x is not None and x.numel() == 0


def _siblings(name: str, other: str, source: str) -> bool:
    """Whether two names differ in numbers alone, behind what ``name`` has in common with the source."""
    ours, theirs, parts = name.split("."), other.split("."), source.split(".")
    common = 0
    while common < min(len(ours), len(parts)) and ours[common] == parts[common]:
        common += 1
    if len(ours) != len(theirs) or ours[:common] != theirs[:common]:
        return False
    return all(a == b or (a.isdecimal() and b.isdecimal()) for a, b in zip(ours, theirs, strict=True))
