"""Compiled code does not see hooks that were added or removed after its compilation, so it is compiled again."""

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_compress.core.modifier import Modifier
from lightning_compress.training.submodule import is_compiled

__all__ = ["HookWatch", "reset_compiled"]


def reset_compiled(pl_module: LightningModule | None) -> None:
    """Drop compiled code where the LightningModule, or anything in it, is compiled."""
    if pl_module is not None and is_compiled(pl_module):
        torch.compiler.reset()


class HookWatch:
    """Resets compiled code whenever the hooked modules change."""

    def __init__(self) -> None:
        self._hooked: list[nn.Module] = []

    def update(self, modifiers: Iterable[Modifier], pl_module: LightningModule | None) -> None:
        """Call it wherever the hooks of the modifiers may have changed."""
        hooked = [module for modifier in modifiers for module in modifier.hooked]
        if hooked != self._hooked:
            reset_compiled(pl_module)
        self._hooked = hooked
