"""Reference of the op, slow and obvious.

    y = x (B (x) S_P) scale         S_1 = [1],  S_2p = [[S_p, S_p], [S_p, -S_p]]       (Sylvester 1867)

Shapes: n = m P features, B [m, m], P a power of two.
"""

import torch
from torch import Tensor

__all__ = ["hadamard_transform", "sylvester"]


def hadamard_transform(x: Tensor, base_mm: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """y [..., n] in float64."""
    base_mm = torch.ones(1, 1, device=x.device, dtype=torch.float64) if base_mm is None else base_mm
    H_nn = torch.kron(base_mm.double(), sylvester(x.shape[-1] // len(base_mm)).to(x.device))
    return x.double() @ H_nn * scale


def sylvester(P: int) -> Tensor:
    """S_P [P, P], float64."""
    S = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(S) < P:
        S = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"), S)
    return S
