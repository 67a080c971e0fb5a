r"""Choosing one of a few patterns with gradients: Gumbel-softmax over the masks that keep N of M weights.

    p_k = softmax_k( (kappa l_k + g_k) / tau ),   g_k = -log(-log u_k),   u_k uniform in (0, 1)
    m~ = sum_k p_k S_k                             a soft mask; near 0 and 1 where tau is small

Jang, Gu & Poole 2017, arXiv:1611.01144; for masks Fang et al. 2024, "MaskLLM", arXiv:2409.17481, eq. (4) to (7).

Shapes: K patterns of M weights (six for 2:4), B groups of M columns in a row, R rows, C = B M columns.
"""

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["gumbel", "hard_mask", "patterns", "prior_shift", "soft_mask"]


def patterns(n: int, m: int) -> Tensor:
    """All masks of M weights that keep N: float32 [K, M], in the order of ``itertools.combinations``."""
    index_KN = torch.tensor(list(combinations(range(m), n)), dtype=torch.int64, device="cpu")
    return torch.zeros(len(index_KN), m, dtype=torch.float32, device="cpu").scatter_(1, index_KN, 1.0)


def gumbel(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Gumbel noise, float32, the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return -torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7)))


def soft_mask(l_RBK: Tensor, g_RBK: Tensor, kappa: Tensor, tau: Tensor, S_KM: Tensor) -> Tensor:
    """The soft mask [R, C], with gradient for the logits.

    Args:
        l_RBK: Logits.
        g_RBK: Gumbel noise.
        kappa: Factor of the logits; larger: less exploration.
        tau: Temperature; smaller: closer to a hard mask.
        S_KM: The patterns.
    """
    p_RBK = torch.softmax((kappa * l_RBK.float() + g_RBK) / tau, -1)
    return (p_RBK @ S_KM).flatten(1)


def hard_mask(l_RBK: Tensor, S_KM: Tensor) -> Tensor:
    """The most likely patterns: bool [R, C], True survives; ties go to the first."""
    return S_KM[l_RBK.argmax(-1)].flatten(1) > 0


def prior_shift(keep_RC: Tensor, S_KM: Tensor) -> Tensor:
    """Similarity of each pattern to a mask: S_k . m minus its mean over k, [R, B, K]; eq. (9)."""
    similarity_RBK = keep_RC.float().unflatten(1, (-1, S_KM.shape[1])) @ S_KM.t()
    return similarity_RBK - similarity_RBK.mean(-1, keepdim=True)
