"""The module around layers that are fed by one source (an attention, an MLP): its calls kept, its output's error.

Kept are the parent's inputs and its dense outputs for all batches, of one block at a time, where they were made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.precision import model_precision

__all__ = ["ParentCalls", "common_parent", "counted", "first_tensor", "keep_calls"]

SAME = 1e-2  # of the largest output: what rounding may differ by; a call that is cut wrongly is far beyond


def common_parent(names: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost module that holds all of these and has a forward of its own; None where there is none.

    Args:
        names: Dotted names, at least two.
        modules: The modules of the block by dotted name.
    """
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    while common:
        name = ".".join(parts[0][:common])
        if name in modules and not isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            whole = all(f"{name}.{child}" in modules for child, _ in modules[name].named_modules() if child)
            return name if whole else None  # else blocks lie inside that are walked by themselves
        common -= 1
    return None


@dataclass
class ParentCalls:
    """Calls of one parent: arguments, dense output, and which tokens count, batch by batch."""

    module: nn.Module
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def squared_error(self, batches: Sequence[int]) -> float:
        """||output now - dense output||^2 over some batches, of the tokens that count."""
        total = 0.0
        for i in batches:
            args, kwargs = self.arguments[i]
            both = self._run(args, kwargs), self.outputs[i]
            output, dense = (counted(tensor, self.masks[i]).float() for tensor in both)
            total += float((output - dense).square().sum().double())
        return total

    def split(self, tokens: int) -> "ParentCalls":
        """The same calls in pieces of at least so many tokens, cut between samples.

        What is cut is every tensor whose leading size is that of the output. Whether the parent may be called so is
        tried on a piece of the first call, with the weights as they are now; where it fails, or gives something else,
        nothing is cut.
        """
        pieces = ParentCalls(self.module)
        for (args, kwargs), output, mask in zip(self.arguments, self.outputs, self.masks, strict=True):
            samples = len(output) if output.ndim > 2 else 1
            each = max(1, math.ceil(tokens * samples * output.shape[-1] / output.numel())) if output.numel() else 1
            for i in range(0, samples, each) if samples > 1 else ():

                def part(tensor: Tensor, i: int = i, samples: int = samples, each: int = each) -> Tensor:
                    return tensor[i : i + each] if tensor.ndim and len(tensor) == samples else tensor

                cut_args, cut_kwargs = tree_map_only(Tensor, part, (args, kwargs))
                pieces.add(cut_args, cut_kwargs, part(output), None if mask is None else part(mask))
            if samples == 1:
                pieces.add(args, kwargs, output, mask)
        return pieces if len(pieces.outputs) > len(self.outputs) and pieces.hold() else self

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, mask: Tensor | None) -> None:
        """One more call."""
        self.arguments.append((args, kwargs))
        self.outputs.append(output)
        self.masks.append(mask)

    def hold(self) -> bool:
        """Whether the parent answers the first call as is written here, up to rounding."""
        args, kwargs = self.arguments[0]
        try:
            found = self._run(args, kwargs)
        except Exception:  # made for whole batches
            return False
        expected = self.outputs[0]
        same = found.shape == expected.shape
        return same and bool((found - expected).abs().max() <= SAME * expected.abs().max())

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with model_precision():
            return first_tensor(self.module(*args, **kwargs))

    def tokens(self) -> list[int]:
        """How many count, by batch."""
        rows = [counted(output, mask) for output, mask in zip(self.outputs, self.masks, strict=True)]
        return [t.numel() // max(1, t.shape[-1]) if t.ndim else t.numel() for t in rows]


def keep_calls(
    parents: Mapping[str, nn.Module], run: Callable[[], Any], mask: Callable[[], Tensor | None]
) -> dict[str, ParentCalls]:
    """Run all batches once and keep the calls of some parents.

    Args:
        parents: By dotted name.
        run: Puts all batches through the block.
        mask: The tokens that count of the batch that runs now.

    Returns:
        By name; those that are never called are left out.
    """
    kept = {name: ParentCalls(module) for name, module in parents.items()}
    shared: dict[int, tuple[Tensor, Tensor]] = {}

    def own(tensor: Tensor) -> Tensor:
        """A copy, since the block may write into it; one for all calls that get the very same tensor."""
        if id(tensor) not in shared or shared[id(tensor)][0] is not tensor:
            shared[id(tensor)] = (tensor, tensor.clone())
        return shared[id(tensor)][1]

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)

        def copy(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor is hidden else own(tensor)

        kept[name].arguments.append(tree_map_only(Tensor, copy, (args, kwargs)))
        kept[name].masks.append(mask())

    with ExitStack() as stack:
        for name, module in parents.items():
            stack.callback(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, n=name: before(n, args, kwargs), with_kwargs=True
                ).remove
            )
            stack.callback(
                module.register_forward_hook(
                    lambda _m, _args, output, n=name: kept[n].outputs.append(first_tensor(output).clone())
                ).remove
            )
        run()
    return {name: calls for name, calls in kept.items() if calls.outputs}


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of an output."""
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return found[0] if found else torch.zeros(0, dtype=torch.float32)


def counted(output: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, where the output's leading shape is that of the mask."""
    if mask is None:
        return output
    mask = mask.to(output.device)
    if output.shape[: mask.ndim] == mask.shape:
        return output[mask]
    return output[mask.flatten()] if output.ndim and len(output) == mask.numel() else output
