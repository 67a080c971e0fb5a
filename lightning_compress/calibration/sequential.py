"""The walk: calibration data through a model, block by block, each compressed before the next sees its outputs.

    CALIBRATION_START                      hooks go on
    survey                                 for modifiers that ask for it: all batches through the dense model
    probe                                  the first batch once through the dense model: the order of things
    for each segment of linked blocks:
        modules before it                  BLOCK_END, with no block
        capture                            its first block's inputs, and every block's own arguments; blocks are not run
        for each block:
            statistics                     all batches through the block, hooks on            | one pass: in lockstep,
            BLOCK_END                      modifiers compress it                              | MODULE_READY per module,
            outputs                        all batches through the compressed block, paused   | then BLOCK_END
    modules after the blocks               BLOCK_END, with no block
    CALIBRATION_END                        hooks come off

Nothing is traced. Of the hidden states one block's are kept; other arguments are kept by reference until their block is
done. At the moment every process walks alone: rank 0 calibrates where there are several (State.distributed is unused).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import BatchRunner, check_weights
from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.dense_survey import survey
from lightning_compress.calibration.inputs import check_batch
from lightning_compress.calibration.modes import calibration_mode
from lightning_compress.calibration.walker import WALKS, Walk, Walker
from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State
from lightning_compress.layers.split_experts import split_while, watched

__all__ = ["calibrate"]


def calibrate(
    lifecycle: Lifecycle,
    state: State,
    batches: Sequence[Any] | None,
    *,
    clock: Event = Event(),  # noqa: B008  (frozen)
    forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None,
    walk: Walk = "auto",
    device: str | torch.device | None = None,
    offload_device: str | torch.device | None = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    moe_calibrate_all_experts: bool = False,
) -> None:
    """Show calibration data to the modifiers and let them compress the model, block after block.

    Args:
        lifecycle: The initialized modifiers.
        state: With the model, which is changed in place.
        batches: What the model is run on, in order; None for recipes that need no data.
        clock: What the events' clock shows.
        forward: ``forward(model, batch)`` runs the model on a batch; by default a mapping gives keyword arguments, of a
            tuple or list the first item is the input, and anything else is the input.
        blocks: Class names, dotted names or ``re:`` patterns of the blocks; None: they are found.
        walk: ``two_pass``: every block runs twice per batch. ``one_pass``: in lockstep, once (for modifiers that can
            finish single modules). ``whole``: the model as one block, statistics of all targets at once. ``auto``: one
            pass where every modifier and the model allow it, else two.
        device: Blocks are moved there for their turn; None: the model stays where it is.
        offload_device: Where the inputs of blocks are kept; None: where they are made.
        progress: Called with what is done now, and how many of how many blocks are done.
        moe_calibrate_all_experts: Fused experts that are watched get all tokens, not only those of the router.

    Raises:
        ValueError: No batches although a modifier needs them, NaN or Inf in weights or activations, ``blocks`` that
            match nothing, a walk that a modifier or the model does not allow.
    """
    model = state.model
    if model is None:
        raise ValueError("state.model is None; expected the model to compress, as State(model=model)")
    if walk not in WALKS:
        raise ValueError(f"walk={walk!r} is unknown; expected one of {', '.join(map(repr, WALKS))}")
    if walk == "whole" and blocks is not None:
        raise ValueError(f"walk='whole' takes the model as one block, so blocks={blocks!r} has no use; leave one out")
    _check_batches(lifecycle.modifiers, batches)
    found = {} if walk == "whole" else find_blocks(model, blocks)
    taken = [] if batches is None else list(batches)
    if taken and forward is None and any(m.needs.data for m in lifecycle.modifiers):
        check_batch(model, taken[0])
    runner = BatchRunner(model, forward)
    walker = Walker(lifecycle, state, clock, taken, runner, walk, _device(device), _device(offload_device), progress)
    # weights that training goes on with stay one tensor: who takes over knows nothing of the experts in it
    mixtures = nullcontext() if any(m.needs.hand_over for m in lifecycle.modifiers) else split_while(model)
    try:
        with mixtures, watched(model, moe_calibrate_all_experts), calibration_mode(model):
            check_weights(model)
            lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_START))
            if taken:
                survey(lifecycle, state, clock, taken, runner, found, walker.device, progress)
            if walker.batches and any(m.hooked for m in lifecycle.modifiers if m.needs.calibration):
                walker.walk_with_data(found)
            else:
                walker.walk_without_data(found)
            lifecycle.set_token_mask(None)
            lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_END))
    except BaseException as error:
        lifecycle.set_token_mask(None)
        lifecycle.abort()
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("while calibrating: try smaller batches, walk='two_pass', offload_device='cpu'")
        raise


def _check_batches(modifiers: Sequence[Modifier], batches: Sequence[Any] | None) -> None:
    if batches is not None and len(batches) == 0:
        raise ValueError("batches is empty, expected at least one calibration batch; look at what the loader yields")
    needy = [m.name for m in modifiers if m.needs.data]
    if needy and batches is None:
        raise ValueError(
            f"{', '.join(needy)} needs calibration data and there are no batches; pass batches=[...], such as a few "
            f"batches of the training data"
        )


def _device(device: str | torch.device | None) -> torch.device | None:
    """With its index, so that devices compare."""
    if device is None:
        return None
    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if named.type == "cuda" and named.index is None else named
