"""The units of a block, their calls in one run, and probes: runs in which all units return their recorded outputs.

A unit is a module with parameters of its own and none below it (a Linear, a norm, a router, fused experts). In a probe
each unit returns what it returned in the recorded run, whatever its input, and one of them, the source, t times that.
So the scaled tensor goes through attention, activations and gates, and stops at the next unit: the input of a unit
there, divided by its recorded input, shows which channels of the source lead to it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.layers.forward import patched

__all__ = ["Recording", "UnitCall", "find_units", "probe", "record", "relative_change"]


@dataclass(frozen=True)
class UnitCall:
    """Arguments and output of one call of a unit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def main_input(self) -> Tensor | None:
        """The first floating tensor among the arguments."""
        tensors = (a for a in [*self.args, *self.kwargs.values()] if isinstance(a, Tensor) and a.is_floating_point())
        return next(tensors, None)

    @property
    def other_inputs(self) -> list[Tensor]:
        """The tensors among the arguments beside the main input."""
        main = self.main_input
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t is not main]


@dataclass
class Recording:
    """One run of a block: calls of every unit, in the order of their first calls, and the output of the block."""

    units: Mapping[str, nn.Module]
    calls: dict[str, list[UnitCall]] = field(default_factory=dict)
    output: Any = None


def find_units(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules with parameters of their own and none below them."""
    return {
        name: module
        for name, module in modules.items()
        if any(True for _ in module.parameters(recurse=False))
        and not any(any(True for _ in child.parameters()) for child in module.children())
    }


def record(units: Mapping[str, nn.Module], run: Callable[[], Any], inputs: bool = True) -> Recording:
    """Run once and record the output of every unit, and its arguments where ``inputs``."""
    recording = Recording(units)

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = (args, kwargs) if inputs else ((), {})
        copies = tree_map_only(Tensor, torch.clone, (*arguments, output))  # the model may write into them
        recording.calls.setdefault(name, []).append(UnitCall(*copies))

    with ExitStack() as stack:
        for name, unit in units.items():
            handle = unit.register_forward_hook(lambda _m, *call, n=name: note(n, *call), with_kwargs=True)
            stack.callback(handle.remove)
        recording.output = run()
    return recording


def probe(
    recording: Recording, run: Callable[[], Any], source: str, factor_R: Tensor
) -> tuple[dict[str, list[Tensor | None]], bool]:
    """Run again with the outputs of all units fixed, those of ``source`` times ``factor_R`` along their last axis.

    Returns:
        For each unit whose input differs from the recorded one, the main input of each call (None: another argument
        differs, or the shape does), and whether anything but the inputs of units differs.
    """
    changed: dict[str, list[Tensor | None]] = {}
    counts = dict.fromkeys(recording.calls, 0)
    is_other_path = False

    def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal is_other_path
        calls, index = recording.calls.get(name, []), counts.get(name, 0)
        if index >= len(calls):
            is_other_path = True
            return recording.units[name](*args, **kwargs)
        counts[name] = index + 1
        before, now = calls[index], UnitCall(args, kwargs, None)
        old, new, others_match = before.main_input, now.main_input, _all_same(before.other_inputs, now.other_inputs)
        if not (_same(new, old) and others_match):
            scaled = others_match and old is not None and new is not None and new.shape == old.shape
            inputs = changed.setdefault(name, [call.main_input for call in calls])
            inputs[index] = new.clone() if scaled and new is not None else None
        output = tree_map_only(Tensor, torch.clone, before.output)
        return output * factor_R.to(output.dtype) if name == source else output

    with ExitStack() as stack:
        for name in recording.calls:
            unit = recording.units[name]
            stack.enter_context(patched(unit, forward=lambda *args, _n=name, **kw: answer(_n, args, kw)))
        output = run()
    leaks = is_other_path or relative_change(recording.output, output) > 1e-5
    return changed, leaks or any(counts[name] != len(calls) for name, calls in recording.calls.items())


def relative_change(before: Any, after: Any) -> float:
    """The largest ||a - b|| / ||b|| among the floating tensors of two outputs; inf where these do not correspond."""
    old, new = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (before, after))
    if len(old) != len(new) or any(b.shape != a.shape for b, a in zip(old, new, strict=True)):
        return float("inf")
    worst = 0.0
    for b, a in zip(old, new, strict=True):
        if torch.equal(a, b) or not b.is_floating_point():
            continue
        b, a = (t.float().nan_to_num_(0.0, 0.0, 0.0) for t in (b, a))  # rows of padding may hold NaN
        change, size = float((a - b).norm()), float(b.norm())
        worst = max(worst, change / size if size else float("inf") if change else 0.0)
    return worst


def _all_same(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(before) == len(now) and all(_same(a, b) for a, b in zip(before, now, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other
