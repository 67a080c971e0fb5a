"""The module around layers that one source feeds (an attention, an MLP): its recorded calls, and its output's error.

Recorded are the inputs and dense outputs of the parent for all batches of one block, on the device they were made on.
Each of several ranks records its own batches; errors are those of all ranks, piece by piece.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.precision import model_precision
from lightning_compress.team import Team

__all__ = ["ParentCalls", "Place", "common_parent", "counted", "first_tensor", "modules_around", "record_calls"]

SAME = 1e-2  # of the largest output: rounding differs by less, a call that is split wrongly by far more


def common_parent(names: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost module that holds all of these layers and has a forward of its own; None where there is none.

    Args:
        names: Dotted names of the layers, at least two.
        modules: Modules of the block by dotted name.
    """
    paths = [name.split(".") for name in names]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    for end in range(depth, 0, -1):
        name = ".".join(paths[0][:end])
        if name in modules and not isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            is_inside = all(f"{name}.{child}" in modules for child, _ in modules[name].named_modules() if child)
            return name if is_inside else None  # else it holds blocks, which are walked one by one
    return None


def modules_around(names: Sequence[str], model: nn.Module) -> dict[str, nn.Module]:
    """Every module that :func:`common_parent` may return for some of these layers."""
    paths = [name.split(".") for name in names]
    counts = Counter(".".join(path[:end]) for path in paths for end in range(1, len(path)))
    return {
        name: module
        for name, module in model.named_modules()
        if counts[name] > 1 and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }


Place = tuple[int, int]
"""Of a call among those of all ranks: the number of its batch, and its own number on the rank that has the batch."""


@dataclass
class ParentCalls:
    """Calls of one parent: arguments, dense output, which tokens count, and the number of the batch."""

    module: nn.Module
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)  # by call: of the places of its output; others weigh 1

    def places(self) -> list[Place]:
        return [(batch, i) for i, batch in enumerate(self.batches)]

    def squared_errors(self, places: Collection[Place]) -> dict[Place, float]:
        """||output now - dense output||^2 of those calls that this rank has, over the tokens that count."""
        errors = {}
        for place, recorded, mask in zip(self.places(), self.outputs, self.masks, strict=True):
            if place in places:
                output, dense = (counted(tensor, mask).float() for tensor in (self.run(place[1]), recorded))
                squares, weight = (output - dense).square(), self.weights.get(place[1])
                if weight is not None:
                    squares *= counted(weight, mask)[..., None]
                errors[place] = float(squares.sum().double())
        return errors

    def split(self, tokens: int, team: Team = Team()) -> "ParentCalls":  # noqa: B008  (frozen)
        """The same calls in pieces of at least so many tokens, each of some samples.

        Every tensor whose leading size is that of the output is split. A piece of the first call of all ranks is tried
        with the weights as they are now; where the parent fails, or returns something else, no rank splits anything.
        """
        pieces = self._pieces(tokens)
        ranks = team.gather((self.batches[:1], len(pieces.outputs) > len(self.outputs)), "pieces of calls")
        if not any(more for _, more in ranks):
            return self
        owner = min((rank for rank in range(len(ranks)) if ranks[rank][0]), key=lambda rank: ranks[rank][0])
        return pieces if team.result(pieces.reproduce, "trying a piece of a call", owner) else self

    def _pieces(self, tokens: int) -> "ParentCalls":
        pieces = ParentCalls(self.module)
        calls = zip(self.arguments, self.outputs, self.masks, self.batches, strict=True)
        for number, ((args, kwargs), output, mask, batch) in enumerate(calls):
            weight = self.weights.get(number)
            samples = len(output) if output.ndim > 2 else 1
            step = max(1, math.ceil(tokens * samples * output.shape[-1] / output.numel())) if output.numel() else 1
            if samples == 1:
                pieces.add(args, kwargs, output, mask, batch, weight)
                continue
            for i in range(0, samples, step):

                def piece(tensor: Tensor, rows: slice = slice(i, i + step), samples: int = samples) -> Tensor:
                    return tensor[rows] if tensor.ndim and len(tensor) == samples else tensor

                pieces.add(*tree_map_only(Tensor, piece, (args, kwargs, output, mask, batch, weight)))
        return pieces

    def add(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
        mask: Tensor | None,
        batch: int = 0,
        weight: Tensor | None = None,
    ) -> None:
        """One more call, of a batch with this number."""
        if weight is not None:
            self.weights[len(self.outputs)] = weight
        self.arguments.append((args, kwargs))
        self.outputs.append(output)
        self.masks.append(mask)
        self.batches.append(batch)

    def reproduce(self) -> bool:
        """Whether the parent returns the recorded output of the first call, up to rounding."""
        args, kwargs = self.arguments[0]
        try:
            output = self.call(args, kwargs)
        except Exception:  # a parent that takes only whole batches
            return False
        dense = self.outputs[0]
        return output.shape == dense.shape and bool((output - dense).abs().max() <= SAME * dense.abs().max())

    def run(self, i: int) -> Tensor:
        """The present output of a call."""
        return self.call(*self.arguments[i])

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The present output for some arguments."""
        with model_precision():
            return first_tensor(self.module(*args, **kwargs))

    def tokens(self) -> list[int]:
        """Number of tokens that count in each call."""
        rows = [counted(output, mask) for output, mask in zip(self.outputs, self.masks, strict=True)]
        return [t.numel() // max(1, t.shape[-1]) if t.ndim else t.numel() for t in rows]


def record_calls(
    parents: Mapping[str, nn.Module],
    run: Callable[[], Any],
    mask: Callable[[], Tensor | None],
    batch: Callable[[], int] = lambda: 0,
) -> dict[str, ParentCalls]:
    """Run all batches once and record the calls of some parents.

    Args:
        parents: Modules by dotted name.
        run: Puts all batches through the block.
        mask: Returns the tokens that count of the current batch.
        batch: Returns the number of the current batch.

    Returns:
        Calls by the name of the parent.
    """
    calls = {name: ParentCalls(module) for name, module in parents.items()}
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def shared_copy(tensor: Tensor) -> Tensor:
        """A copy, since the block may write into the tensor; one for all calls that receive it."""
        if id(tensor) not in copies or copies[id(tensor)][0] is not tensor:
            copies[id(tensor)] = (tensor, tensor.clone())
        return copies[id(tensor)][1]

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)

        def copy(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor is hidden else shared_copy(tensor)

        calls[name].arguments.append(tree_map_only(Tensor, copy, (args, kwargs)))
        calls[name].masks.append(mask())
        calls[name].batches.append(batch())

    def after(name: str, output: Any) -> None:
        calls[name].outputs.append(first_tensor(output).clone())

    with ExitStack() as stack:
        for name, module in parents.items():
            handles = (
                module.register_forward_pre_hook(lambda _m, *call, n=name: before(n, *call), with_kwargs=True),
                module.register_forward_hook(lambda _m, _args, output, n=name: after(n, output)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        run()
    return calls


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of an output."""
    tensors = (t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    return next(tensors, torch.zeros(0, dtype=torch.float32, device="cpu"))


def counted(output: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, where the leading shape of the output is the one of the mask."""
    if mask is None:
        return output
    mask = mask.to(output.device)
    if output.shape[: mask.ndim] == mask.shape:
        return output[mask]
    return output[mask.flatten()] if output.ndim and len(output) == mask.numel() else output
