"""Fold a scale into a source and its consumers, undo it, and measure how much the block changes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers.matrix import is_transposed
from lightning_compress.modifiers.smoothing.pair import Consumer, Pair, SourceForm
from lightning_compress.modifiers.smoothing.unit_probe import find_units, record, relative_change

__all__ = ["change_by_folding", "fold", "restored", "scale_consumer", "scale_source"]


@torch.no_grad()
def fold(pair: Pair, modules: Mapping[str, nn.Module], s_J: Tensor) -> None:
    """Divide the channels of the source by s and multiply the weights of its consumers by s, in place.

    Args:
        pair: Source and consumers.
        modules: Modules of the block by dotted name.
        s_J: The scale, above 0; computed in float32 and rounded once to the dtype of each parameter.
    """
    scale_source(modules[pair.source], pair.form, pair.channels_J, s_J)
    for name, consumer in pair.consumers.items():
        scale_consumer(modules[name], consumer, s_J)


@torch.no_grad()
def scale_source(unit: nn.Module, form: SourceForm, channels_J: Tensor, s_J: Tensor) -> None:
    """Divide output channels by s."""
    for name, parameter in unit.named_parameters(recurse=False):
        axis = int(is_transposed(unit) and parameter.ndim > 1)  # that runs over outputs
        shape = [-1 if i == axis else 1 for i in range(parameter.ndim)]
        channels = channels_J.to(parameter.device)
        old = parameter.index_select(axis, channels).to(torch.promote_types(parameter.dtype, torch.float32))
        s = s_J.to(old).view(shape)
        new = (1 + old) / s - 1 if form == "one_plus_weight" and name == "weight" else old / s
        parameter.index_copy_(axis, channels, new.to(parameter.dtype))


@torch.no_grad()
def scale_consumer(unit: nn.Module, consumer: Consumer, s_J: Tensor) -> None:
    """Multiply the weights of each scaled input channel by s."""
    for name, axis in consumer.axes.items():
        parameter = unit.get_parameter(name)
        s_C = spread(consumer.index_C, s_J).to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        shape = [-1 if i == axis % parameter.ndim else 1 for i in range(parameter.ndim)]
        parameter.copy_((parameter.to(s_C.dtype) * s_C.view(shape)).to(parameter.dtype))


def spread(index_C: Tensor, s_J: Tensor) -> Tensor:
    """The scale of each input channel of a consumer, [C]; 1 where it is not scaled."""
    index_C = index_C.to(s_J.device)
    return torch.where(index_C >= 0, s_J[index_C.clamp(min=0)], torch.ones_like(s_J[:1]))


@contextmanager
def restored(*units: nn.Module) -> Iterator[None]:
    """Put the parameters of these modules back to their values, bit for bit, when the context ends."""
    before = {p: p.detach().clone() for unit in units for p in unit.parameters(recurse=False)}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def change_by_folding(
    pairs: Sequence[Pair], modules: Mapping[str, nn.Module], run: Callable[[], Any], generator: torch.Generator
) -> float:
    """How much the outputs of a block change when random scales are folded; the parameters are restored.

    This is the largest ||change|| / ||value|| of the output of the block and of the outputs of all units but the
    sources: a large residual would hide much in the output of the block alone. Scales are 2^-2 ... 2^2, exact in any
    dtype.
    """
    sources = {pair.source for pair in pairs}
    units = find_units({name: module for name, module in modules.items() if name not in sources})
    before = record(units, run, inputs=False)
    involved = {name for pair in pairs for name in [pair.source, *pair.consumers]}
    with restored(*[modules[name] for name in involved]):
        for pair in pairs:
            exponents = torch.randint(-2, 3, pair.channels_J.shape, generator=generator, device="cpu")
            fold(pair, modules, torch.exp2(exponents.float()).to(pair.channels_J.device))
        after = record(units, run, inputs=False)
    if list(before.calls) != list(after.calls):
        return float("inf")
    outputs = [(before.output, after.output)]
    for name, calls in before.calls.items():
        if len(calls) != len(after.calls[name]):
            return float("inf")
        outputs += [(a.output, b.output) for a, b in zip(calls, after.calls[name], strict=True)]
    return max(relative_change(a, b) for a, b in outputs)
