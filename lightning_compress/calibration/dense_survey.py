"""Before the walk: all batches once through the dense model, with the hooks of the modifiers that need it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import BatchRunner, device_of, token_mask, tree_move
from lightning_compress.calibration.blocks import modules_of_block, modules_outside
from lightning_compress.calibration.placement import on_device, streamed
from lightning_compress.core import Event, EventType, Lifecycle, State

__all__ = ["survey"]


def survey(
    lifecycle: Lifecycle,
    state: State,
    clock: Event,
    batches: Sequence[Any],
    runner: BatchRunner,
    blocks: Mapping[str, nn.Module],
    device: torch.device | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Show the dense model to the modifiers that survey it, then BLOCK_SURVEYED per block and for modules outside.

    Args:
        lifecycle: The modifiers, after CALIBRATION_START.
        state: State with the model.
        clock: Clock of the events.
        batches: Calibration batches.
        runner: Runs the model on a batch.
        blocks: Blocks of the model by name; empty: all modules are outside of blocks.
        device: Device for the blocks in their turn, or for a model without blocks; None: nothing is moved.
        progress: Called before each batch.
    """
    model = runner.model
    surveying = [m for m in lifecycle.modifiers if m.needs.survey]
    if not surveying:
        return
    home = device or device_of(model)
    with ExitStack() as stack:
        stack.enter_context(streamed(blocks, device) if blocks else on_device(model, device))
        for modifier in lifecycle.modifiers:
            if not any(modifier is one for one in surveying):
                stack.enter_context(modifier.paused())
        for i, batch in enumerate(batches):
            if progress is not None:
                progress(f"survey of the dense model, batch {i + 1}/{len(batches)}", 0, len(blocks) + 1)
            lifecycle.set_token_mask(tree_move(token_mask(batch), home))
            runner(batch)
    lifecycle.set_token_mask(None)
    surveyed = replace(clock, type_=EventType.BLOCK_SURVEYED)
    for name, block in blocks.items():
        modules = modules_of_block(name, block)
        lifecycle.emit(state.but(block=block, block_name=name, modules=modules), surveyed, only=surveying)
    outside = modules_outside(model, blocks)
    lifecycle.emit(state.but(block=None, block_name="", modules=outside), surveyed, only=surveying)
