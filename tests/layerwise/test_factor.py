"""The factor of the damped Hessian."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.layerwise.factor import factorize
from tests.support.allocations import allocated
from tests.support.quantization_runs import correlated

F64 = torch.float64


def problem(rows: int = 10, columns: int = 48, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """W [R, C] and H = E[x x^T] of correlated inputs with outlier columns."""
    X = correlated(20 * columns, columns, seed, dtype)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return W, X.t() @ X / len(X)


def damped(H: Tensor, fraction: float = 0.01) -> Tensor:
    return H + fraction * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def test_the_factor_is_the_matrix():
    _, H = problem()
    factor = factorize(H, 0.05, True)
    root = factor.UT_CC.t() * factor.pivot_C
    assert_close(root @ root.t(), damped(H, 0.05)[factor.order_C][:, factor.order_C])
    assert torch.equal(factor.UT_CC, factor.UT_CC.tril())
    assert_close(factor.UT_CC.diagonal(), torch.ones(48, dtype=F64))
    assert torch.equal(factor.order_C, H.diagonal().argsort(descending=True))
    assert torch.equal(factorize(H, 0.05, False).order_C, torch.arange(48))


@pytest.mark.parametrize("rank", [1, 47])
def test_a_rank_deficient_hessian_without_damping_has_no_factor(rank):
    X = torch.randn(rank, 48, generator=torch.Generator().manual_seed(0))
    assert factorize(X.t() @ X / rank, 0.0, True) is None
    assert factorize(X.t() @ X / rank, 0.01, True) is not None
    assert factorize(torch.full((4, 4), torch.nan), 0.01, True) is None


def test_one_matrix_beside_the_hessian():
    C = 400
    X_NC = torch.randn(4 * C, C, generator=torch.Generator().manual_seed(0))
    H_CC = X_NC.T @ X_NC / len(X_NC)
    peak, _, factor = allocated(lambda: factorize(H_CC, 0.01, by_size=True))
    assert factor.UT_CC.nbytes == H_CC.nbytes
    assert peak < 1.8 * H_CC.nbytes
