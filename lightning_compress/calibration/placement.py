"""Blocks visit the accelerator: there for their turn, back home afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import device_of, tree_move

__all__ = ["on_device", "streamed"]


@contextmanager
def on_device(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The module lies on the device inside, and where it was afterwards; None: it stays."""
    home = device_of(module)
    if device is None or home is None or home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def streamed(blocks: Mapping[str, nn.Module], device: torch.device | None) -> Iterator[None]:
    """Inside, every call of a block takes place on the device, one block there at a time; None: they stay.

    Outputs come back to where the block lies, so that the code between the blocks notices nothing.
    """
    if device is None:
        yield
        return
    visits: dict[nn.Module, Any] = {}

    def come(block: nn.Module, args: Any, kwargs: Any) -> Any:
        visits[block] = (home := device_of(block), stack := ExitStack())
        stack.enter_context(on_device(block, device))
        return tree_move((args, kwargs), device if home is not None else None)

    def leave(block: nn.Module, _args: Any, output: Any) -> Any:
        home, stack = visits.pop(block)
        stack.close()
        return tree_move(output, home)

    with ExitStack() as hooks:
        try:
            for block in blocks.values():
                hooks.callback(block.register_forward_pre_hook(come, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            yield
        finally:
            for _, stack in visits.values():  # a run that was stopped inside a block
                stack.close()
