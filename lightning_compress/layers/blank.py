"""Blanks: tensors on the meta device whose values are in files, which are read when a walk needs them.

Modifiers are set up on them; a tensor on meta that is not a blank has no values at all, and is refused.
"""

import torch
from torch import Tensor, nn

__all__ = ["blank_of", "is_blank", "mark_blank"]

_MARK = "_lightning_compress_blank"


def mark_blank(tensor: Tensor) -> None:
    """Say of a tensor on meta that its values are in a file."""
    setattr(tensor, _MARK, True)


def is_blank(tensor: Tensor) -> bool:
    """Whether the values of a tensor on meta are in a file."""
    return getattr(tensor, _MARK, False)


def blank_of(tensor: Tensor) -> Tensor:
    """A blank like ``tensor``; of a Parameter a Parameter."""
    blank = torch.empty_like(tensor, device="meta")
    blank = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    mark_blank(blank)
    return blank
