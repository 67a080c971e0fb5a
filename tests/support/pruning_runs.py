"""What the tests of pruning on calibration data share: arguments that are refused, patterns that are looked at."""

import torch
from torch import Tensor

from tests.support.quantization_runs import correlated

REFUSED = [
    ({"sparsity": 1.5}, r"sparsity=1.5 must lie in \[0, 1\)"),
    ({"sparsity": -0.5}, r"sparsity=-0.5 must lie in \[0, 1\)"),
    ({"sparsity": {"Linear": 1.0}}, r"sparsity=1.0 must lie in \[0, 1\)"),
    ({"sparsity": {}}, "names no targets"),
    ({"sparsity": {"Linear": 0.5}, "targets": ["re:.*"]}, "exclude each other"),
    ({"mask_structure": "3:2"}, "expected 0 < N < M"),
    ({"mask_structure": "2:4", "sparsity": 0.7}, "has sparsity 0.5, but 0.7 was asked for"),
    ({"mask_structure": "channel"}, "expected 'unstructured', or 'N:M'"),
    ({"mask_structur": "2:4"}, "did you mean 'mask_structure'"),
    ({"sparsity_profile": "owl", "mask_structure": "2:4"}, "mask_structure='2:4' gives it already"),
    ({"sparsity_profile": "owl", "sparsity": {"Linear": 0.5}}, "sparsity as a mapping gives it already"),
    ({"sparsity_profile": "owl", "sparsity": 0.9}, r"from 0.74 to 1.06, outside of \[0, 1\); give at most 0.045"),
    ({"sparsity_profile": "loss", "mask_structure": "2:4"}, "for each target; mask_structure='2:4' gives it already"),
    ({"sparsity_profile": "loss", "sparsity": 0.95}, "targets may have .* 0.87 to 1.03, .* give at most 0.04"),
    ({"sparsity_profile": "loss", "owl_m": 7}, "owl_m without sparsity_profile='owl' would do nothing"),
    ({"sparsity_profile": "loss", "objective": "output"}, "need gradients of two losses"),
    ({"owl_m": 7}, "owl_m without sparsity_profile='owl' would do nothing"),
    ({"dampening_frac": -1}, "dampening_frac=-1"),
]


def kept_per_group(W_RC: Tensor, m: int) -> Tensor:
    """Weights that are not zero in every M consecutive columns."""
    return (W_RC.reshape(-1, m) != 0).sum(1)


def problem(
    rows: int = 16, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """W [R, C] and H = E[x x^T] of correlated inputs with outlier columns."""
    X = correlated(20 * columns, columns, seed, dtype)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return W, X.t() @ X / len(X)


def relative_error(W_RC: Tensor, Q_RC: Tensor, H_CC: Tensor) -> float:
    return float((((W_RC - Q_RC) @ H_CC) * (W_RC - Q_RC)).sum() / ((W_RC @ H_CC) * W_RC).sum())
