"""Inputs of layers in the dense model, beside those of the compressed one, for targets that the dense model gives.

    D = E[(x_dense - x) x^T]        ||W x_dense - Q x||^2 = (W - Q) H (W - Q)^T + 2 W D (W - Q)^T + a constant

Shapes: N tokens, C columns, P partitions of a grouped convolution.
"""

import torch
from torch import Tensor

__all__ = ["CrossMoment", "DenseInputs"]

ROWS = 1024  # of a float64 sum that are added to at once


class CrossMoment:
    """The statistic D = sum (x_dense - x) x^T / N; float64 sums of float32 products, as for H.

    Args:
        partitions: P.
        columns: C.
        device: Device of the inputs.
    """

    def __init__(self, partitions: int, columns: int, device: torch.device | str = "cpu"):
        with torch.inference_mode(False):  # it outlives the calibration pass
            self.sums_PCC = torch.zeros(partitions, columns, columns, device=device, dtype=torch.float64)

    def update(self, X_PNC: Tensor, dense_PNC: Tensor) -> None:
        """Add N tokens, as they are and as they are in the dense model."""
        X_PNC = X_PNC.to(torch.promote_types(X_PNC.dtype, torch.float32))
        difference_PNC = dense_PNC.to(X_PNC) - X_PNC
        for low in range(0, X_PNC.shape[2], ROWS):
            rows = slice(low, low + ROWS)
            self.sums_PCC[:, rows] += difference_PNC[:, :, rows].mT @ X_PNC

    def add_(self, other: "CrossMoment") -> "CrossMoment":
        """Add the tokens of another one."""
        self.sums_PCC += other.sums_PCC
        return self

    def value(self, tokens: int) -> Tensor:
        """D [P, C, C] in float32, as a mean over so many tokens."""
        return (self.sums_PCC / max(1, tokens)).float()


class DenseInputs:
    """Inputs of layers in the dense block, by layer and batch, until the layer is finished."""

    def __init__(self) -> None:
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # a tensor and its copy: siblings receive one tensor

    def keep(self, name: str, x: Tensor, batch: int) -> None:
        """A layer of the dense model received ``x``; a second input of one batch cannot be told from the first."""
        if self._last is None or self._last[0] is not x:
            self._last = x, x.detach().clone()  # the block may write into it
        inputs = self._inputs.setdefault(name, {})
        inputs[batch] = self._last[1] if batch not in inputs else x.new_empty(0)

    def seen(self) -> None:
        """The dense block has run: let go of the last input."""
        self._last = None

    def get(self, name: str, x: Tensor, batch: int) -> Tensor | None:
        """The dense input in the place of ``x``; None: not known."""
        self.seen()
        dense = self._inputs.get(name, {}).get(batch)
        return None if dense is None or dense.shape != x.shape else dense.to(x.device)

    def drop(self, name: str) -> None:
        """The layer is finished."""
        self._inputs.pop(name, None)
