"""Checks of activations for NaN and Inf that do not make the host wait for a GPU after each of them.

On the CPU an activation is checked at once. On a GPU its largest number is computed there, and all of them are read
together, in order, before a result that depends on them is used.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.calibration.activations import find_nonfinite, tensors_of
from lightning_compress.layers.sharded import is_dtensor

__all__ = ["FiniteChecks"]


class FiniteChecks:
    """Activations that are checked, and the error of each."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Callable[[str], Exception]]] = []

    def add(self, tree: Any, mask: Tensor | None, error: Callable[[str], Exception]) -> None:
        """Raise ``error("NaN")`` or ``error("Inf")``, now or in :meth:`read`, where a tensor holds one.

        Args:
            tree: A tensor, or a structure of tensors.
            mask: The tokens that count, [B, T]; None: all.
            error: Makes the error.
        """
        for tensor in tensors_of(tree):
            if tensor.is_cuda and not is_dtensor(tensor):
                if tensor.is_floating_point() and tensor.numel():
                    self._pending.append((_largest(tensor, mask), error))
            elif kind := find_nonfinite(tensor, mask):
                raise error(kind)

    def read(self) -> None:
        """Raise the first error of those that wait."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        device = pending[0][0].device
        numbers = torch.stack([number.to(device, non_blocking=True) for number, _ in pending]).tolist()
        for number, (_, error) in zip(numbers, pending, strict=True):
            if not math.isfinite(number):
                raise error("NaN" if math.isnan(number) else "Inf")


def _largest(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The largest absolute number at tokens that count; NaN where one is NaN."""
    tensor = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()  # torch reduces no float8
    if mask is not None and tensor.shape[:2] == mask.shape:
        tensor = tensor.masked_fill(~mask.to(tensor.device).view(*mask.shape, *[1] * (tensor.ndim - 2)), 0)
    return torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.promote_types(tensor.dtype, torch.float32))
