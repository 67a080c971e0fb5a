"""The walk: calibration data through a model, block by block; each is compressed before its outputs reach the next.

    CALIBRATION_START                      hooks go on
    survey                                 for modifiers that need it: all batches through the dense model
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

Nothing is traced. The hidden states of one block are stored; other arguments are stored by reference until their block
is finished. Every process walks alone: where there are several, rank zero calibrates.
"""

from collections.abc import Callable, Mapping, Sequence
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
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.walker import Walker
from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State
from lightning_compress.layers.split_experts import split_while, watched

__all__ = ["calibrate"]


def calibrate(
    lifecycle: Lifecycle,
    state: State,
    batches: Sequence[Any] | None,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    *,
    clock: Event = Event(),  # noqa: B008  (frozen)
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Show calibration data to the modifiers and let them compress the model, block after block.

    Args:
        lifecycle: The initialized modifiers.
        state: State with the model, which is changed in place.
        batches: Calibration batches, in order; None for recipes that need no data.
        options: How calibration goes through the model. The seed is not used here.
        clock: Clock of the events.
        forward: ``forward(model, batch)`` runs the model on a batch; by default a mapping gives keyword arguments, of a
            tuple or list the first item is the input, and anything else is the input.
        progress: Called with a text, the number of finished blocks and the number of all blocks.

    Raises:
        ValueError: No batches although a modifier needs them, NaN or Inf in weights or activations, ``blocks`` that
            match nothing, a walk that a modifier or the model does not allow.
    """
    model = state.model
    if model is None:
        raise ValueError("state.model is None; expected the model to compress, as State(model=model)")
    _check_batches(lifecycle.modifiers, batches)
    blocks = {} if options.walk == "whole" else find_blocks(model, options.blocks)
    batches = [] if batches is None else list(batches)
    if batches and forward is None and any(m.needs.data for m in lifecycle.modifiers):
        check_batch(model, batches[0])
    walker = Walker(lifecycle, state, clock, batches, BatchRunner(model, forward), options, progress)
    # training continues on weights in one tensor: the modifier that comes next does not know the experts in it
    mixtures = nullcontext() if any(m.needs.hand_over for m in lifecycle.modifiers) else split_while(model)
    try:
        with mixtures, watched(model, options.moe_calibrate_all_experts), calibration_mode(model):
            _emit_all(walker, blocks)
    except BaseException as error:
        lifecycle.set_token_mask(None)
        lifecycle.abort()
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("while calibrating: try smaller batches, walk='two_pass', offload_device='cpu'")
        raise


def _emit_all(walker: Walker, blocks: Mapping[str, nn.Module]) -> None:
    """From CALIBRATION_START to CALIBRATION_END."""
    lifecycle, state, clock, batches = walker.lifecycle, walker.state, walker.clock, walker.batches
    check_weights(walker.model)
    lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_START))
    if batches:
        survey(lifecycle, state, clock, batches, walker.runner, blocks, walker.device, walker.progress)
    if batches and any(m.hooked for m in lifecycle.modifiers if m.needs.calibration):
        walker.walk_with_data(blocks)
    else:
        walker.walk_without_data(blocks)
    lifecycle.set_token_mask(None)
    lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_END))


def _check_batches(modifiers: Sequence[Modifier], batches: Sequence[Any] | None) -> None:
    if batches is not None and len(batches) == 0:
        raise ValueError("batches is empty, expected at least one calibration batch; check what the loader yields")
    in_need = [m.name for m in modifiers if m.needs.data]
    if in_need and batches is None:
        raise ValueError(
            f"{', '.join(in_need)} needs calibration data and there are no batches; pass batches=[...], such as a few "
            f"batches of the training data"
        )
