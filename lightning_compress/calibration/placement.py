"""Blocks are moved to the accelerator for their turn, and back afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import device_of, tree_move

__all__ = ["exact_device", "on_device", "streamed"]


def exact_device(device: str | torch.device | None) -> torch.device | None:
    """The device with its index, so that devices compare; None stays None."""
    if device is None:
        return None
    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if named.type == "cuda" and named.index is None else named


@contextmanager
def on_device(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Inside, the module is on the device; afterwards it is where it was. None: it is not moved."""
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
    """Inside, every call of a block runs on the device, one block there at a time; None: blocks are not moved.

    Outputs are moved back to where the block was, so that the code between the blocks needs no change.
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
