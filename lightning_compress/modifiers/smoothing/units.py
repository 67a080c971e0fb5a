"""A block at work, seen as units: modules that hold parameters, their calls, and replays with the units' answers fixed.

A unit is a module with parameters of its own and none below it (a Linear, a norm, a router, fused experts). In a probe
each unit answers as it did in the recorded run, whatever it is given, and one of them, the source, answers t times
that. So the scaled tensor goes through attention, activations and gates as they are, and stops at the next unit: what
a unit is given there, divided by what it was given before, tells which channels of the source lead to its inputs.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.layers.forward import patched

__all__ = ["Call", "Recording", "find_units", "main_input", "probe", "record", "relative_change"]


@dataclass(frozen=True)
class Call:
    """One call of a unit: what it was given, what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Recording:
    """One replay: calls of every unit, in the order in which units were first called, and what came out."""

    units: Mapping[str, nn.Module]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    output: Any = None


def find_units(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules with parameters of their own, and none below."""
    return {
        name: module
        for name, module in modules.items()
        if any(True for _ in module.parameters(recurse=False))
        and not any(any(True for _ in child.parameters()) for child in module.children())
    }


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating tensor among the arguments of a call."""
    found = (a for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and a.is_floating_point())
    return next(found, None)


def record(units: Mapping[str, nn.Module], run: Callable[[], Any], inputs: bool = True) -> Recording:
    """Run once and write down what every unit is given (where ``inputs``) and answers."""
    recording = Recording(units)

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (args, kwargs) if inputs else ((), {})
        kept = tree_map_only(Tensor, torch.clone, (*given, output))  # the model may write into them
        recording.calls.setdefault(name, []).append(Call(*kept))

    with ExitStack() as stack:
        for name, unit in units.items():
            handle = unit.register_forward_hook(
                lambda _m, args, kwargs, output, n=name: note(n, args, kwargs, output), with_kwargs=True
            )
            stack.callback(handle.remove)
        recording.output = run()
    return recording


def probe(
    recording: Recording, run: Callable[[], Any], source: str, factor_R: Tensor
) -> tuple[dict[str, list[Tensor | None]], bool]:
    """Run again with the answers of all units fixed, those of ``source`` times ``factor_R`` along their last axis.

    Returns:
        Per unit that was given something else than before, the first floating tensor of each call (None: another one
        has changed, or its shape has), and whether anything but the inputs of units has changed.
    """
    given: dict[str, list[Tensor | None]] = {}
    counts = dict.fromkeys(recording.calls, 0)
    strayed = False

    def note(name: str) -> list[Tensor | None]:
        return given.setdefault(name, [main_input(call.args, call.kwargs) for call in recording.calls[name]])

    def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal strayed
        calls, at = recording.calls.get(name, []), counts.get(name, 0)
        if at >= len(calls):
            strayed = True  # another way through the block
            return recording.units[name](*args, **kwargs)
        counts[name] = at + 1
        before, x = calls[at], main_input(args, kwargs)
        was = main_input(before.args, before.kwargs)
        if not _same(x, was):
            fine = x is not None and was is not None and x.shape == was.shape
            fine = fine and _others_same(before, args, kwargs, was, x)
            note(name)[at] = x.clone() if fine and x is not None else None
        elif not _others_same(before, args, kwargs, was, x):
            note(name)[at] = None
        output = tree_map_only(Tensor, torch.clone, before.output)
        return output * factor_R.to(output.dtype) if name == source else output

    with ExitStack() as stack:
        for name in recording.calls:
            unit = recording.units[name]
            stack.enter_context(patched(unit, forward=lambda *args, _n=name, **kw: answer(_n, args, kw)))
        output = run()
    leaks = strayed or relative_change(recording.output, output) > 1e-5
    return given, leaks or any(counts[name] != len(calls) for name, calls in recording.calls.items())


def relative_change(before: Any, after: Any) -> float:
    """The largest ||a - b|| / ||b|| among the floating tensors of two outputs; inf where these do not correspond."""
    ours, theirs = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (before, after))
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    worst = 0.0
    for b, a in zip(ours, theirs, strict=True):
        if torch.equal(a, b) or not b.is_floating_point():
            continue
        b, a = (t.float().nan_to_num_(0.0, 0.0, 0.0) for t in (b, a))  # rows of padding may hold NaN
        change, size = float((a - b).norm()), float(b.norm())
        worst = max(worst, change / size if size else float("inf") if change else 0.0)
    return worst


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other


def _others_same(before: Call, args: Any, kwargs: Any, was: Tensor | None, x: Tensor | None) -> bool:
    """Whether the tensors of a call beside its first floating one are as they were."""
    ours = [t for t in tree_leaves((before.args, before.kwargs)) if isinstance(t, Tensor) and t is not was]
    theirs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t is not x]
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
