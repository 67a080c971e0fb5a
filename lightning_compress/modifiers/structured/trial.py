"""A cut tried on a copy of the model first: an error names the layers that break the forward pass."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.structure.groups import Group, cut_of
from lightning_compress.structure.surgery import cut_tensors, tensors_of

__all__ = ["check_cut"]


def check_cut(
    model: nn.Module, groups: Sequence[Group], counts: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """ValueError when the model does not run, or gives outputs of other shapes, once the groups have lost units.

    Following channels reads the graph of operations, which does not show sizes that ``forward`` computes with, such as
    the three parts of a fused ``qkv``. So the cut is made on a copy, and the copy runs once, in evaluation mode. When
    that fails, the groups are tried one by one, to name the layers whose channels cannot be pruned.

    Args:
        model: The model, which is copied for each trial.
        groups: The groups to cut.
        counts: How many units of each group stay.
        args: Positional arguments of a forward pass.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: Names the groups, and what to add to ``ignore``.
    """
    expected = _output_shapes(copy.deepcopy(model), args, kwargs)
    pairs = list(zip(groups, counts, strict=True))
    error = _failure(model, pairs, args, kwargs, expected)
    if error is None:
        return
    broken = [pair[0].name for pair in pairs if _failure(model, [pair], args, kwargs, expected) is not None]
    named = ", ".join(map(repr, broken or [group.name for group in groups]))
    raise ValueError(
        f"without some of the output channels of {named} the model does not run as before: {error}; its forward "
        f"computes with sizes that pruning channels cannot follow: add {named} to ignore"
    ) from error


def _failure(
    model: nn.Module,
    pairs: Sequence[tuple[Group, int]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    expected: list[torch.Size],
) -> Exception | None:
    """The error when only the first units of the groups stay, or None."""
    trial = copy.deepcopy(model)
    tensors = tensors_of(trial)
    try:
        _check_inside(pairs, tensors)
        remaining = [(group, torch.arange(count, device="cpu")) for group, count in pairs]
        cut_tensors(trial, cut_of(remaining, {name: tensor.shape for name, tensor in tensors.items()}))
        shapes = _output_shapes(trial, args, kwargs)
    except Exception as error:  # whatever the user's forward raises
        return error
    if shapes != expected:
        return ValueError(f"its outputs have the shapes {list(map(tuple, shapes))}, not {list(map(tuple, expected))}")
    return None


def _check_inside(pairs: Sequence[tuple[Group, int]], tensors: Mapping[str, Tensor]) -> None:
    for group, _ in pairs:
        for piece in group.slices:
            size = tensors[piece.tensor].shape[piece.dim]
            if int(piece.index.max()) >= size:
                raise ValueError(f"channel {int(piece.index.max())} of {piece.tensor!r} is beyond its size {size}")


def _output_shapes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Size]:
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(devices=list(dict.fromkeys(devices))):
        output = model.eval()(*args, **kwargs)
    return [leaf.shape for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
