"""``compress(model, modifiers, batches)``: the whole lifecycle on any ``nn.Module``, without a Trainer."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.modes import random_state_kept
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.core.interruption import check_uninterrupted, marked_when_interrupted
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.layers.matching import without_parallel
from lightning_compress.layers.split_experts import split_while
from lightning_compress.recipe import read_recipe

__all__ = ["compress"]


def compress(
    model: nn.Module,
    modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None,
    walk: Literal["auto", "one_pass", "two_pass", "whole"] = "auto",
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    offload_device: str | torch.device | None = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    seed: int = 0,
    moe_calibrate_all_experts: bool = False,
) -> Ledger:
    """Compress a model in place.

    >>> compress(model, GPTQModifier(scheme="W4A16"), loader, max_batches=16)

    Args:
        model: Any module, or DataParallel around it; it is changed in place, its modes and the random state are as
            before afterwards.
        modifiers: One, several in the order in which they act, several by name, or the name of a recipe
            (``"gptq_w4"``) or the path of a recipe file.
        batches: Calibration batches, such as a DataLoader; None for recipes that need no data.
        forward: ``forward(model, batch)`` runs the model on a batch; by default a mapping gives keyword arguments, of a
            tuple or list the first item is the input, and anything else is the input.
        blocks: Class names, dotted names or ``re:`` patterns of the repeated blocks; None: they are found.
        walk: See :func:`lightning_compress.calibration.calibrate`.
        max_batches: Take no more of them than this; needed when ``batches`` never ends.
        device: Blocks are moved there for their turn; None: the model stays where it is.
        offload_device: Where the inputs of blocks are kept; None: where they are made.
        progress: Called with what is done now, and how many of how many blocks are done.
        seed: Torch's random state during the run.
        moe_calibrate_all_experts: Statistics of experts that lie in one tensor are taken of all tokens, not only of
            those that the router sends to them; what flows on is what it is without.

    Returns:
        What was done to each module.

    Raises:
        ValueError: No batches although a modifier needs them, none in ``batches``, a model whose compression was
            interrupted before, what modifiers and the walk refuse.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected an nn.Module")
    model = without_parallel(model)
    lifecycle = Lifecycle(_listed(modifiers))
    taken = _take(batches, max_batches)
    state = State(model=model, ledger=Ledger())
    check_uninterrupted(model)
    windowed = any(modifier.start is not None for modifier in lifecycle.modifiers)  # they want experts in one tensor
    mixtures = nullcontext() if windowed else split_while(model)
    with random_state_kept(), mixtures, marked_when_interrupted(model, lambda: len(state.ledger)):
        torch.manual_seed(seed)
        try:
            lifecycle.initialize(state)
            if any(m.needs.calibration for m in lifecycle.modifiers):
                calibrate(
                    lifecycle,
                    state,
                    taken,
                    forward=forward,
                    blocks=blocks,
                    walk=walk,
                    device=device,
                    offload_device=offload_device,
                    progress=progress,
                    moe_calibrate_all_experts=moe_calibrate_all_experts,
                )
            lifecycle.finalize(state)
        except BaseException:
            lifecycle.abort()
            raise
    guard_save_pretrained(model)
    return state.ledger


def _listed(modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str) -> list[Modifier]:
    if isinstance(modifiers, str):
        recipe = read_recipe(modifiers)
        if recipe.arguments:
            raise ValueError(
                f"the recipe {modifiers!r} sets {recipe.arguments} for CompressionCallback: give compress() "
                f"load_recipe({modifiers!r}), and what it takes of these as arguments"
            )
        return recipe.modifiers
    if isinstance(modifiers, Mapping):
        return list(modifiers.values())
    return [modifiers] if isinstance(modifiers, Modifier | type) else list(modifiers)


def _take(batches: Iterable[Any] | None, max_batches: int | None) -> list[Any] | None:
    """The first ``max_batches`` of them."""
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches}, expected at least 1, or None for all")
    if batches is None:
        return None
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(f"batches is one {type(batches).__name__}, expected an iterable of batches; pass [batch]")
    taken = list(islice(batches, max_batches))
    if not taken:
        raise ValueError(
            "batches yields nothing, expected at least one calibration batch; look at the length of the data set, at "
            "drop_last, and whether an iterator was used up before"
        )
    if max_batches is not None and len(taken) < max_batches:
        warnings.warn(f"max_batches={max_batches}, but there are only {len(taken)}: all of them are used", stacklevel=3)
    return taken
