"""The refit against the exact solution of every row."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.layerwise.least_squares_refit import refit
from tests.support.quantization_runs import correlated


def problem(rows: int = 12, columns: int = 24):
    X = correlated(20 * columns, columns, dtype=torch.float64)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = X.t() @ X / len(X)
    H += 0.01 * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    return W, H, torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) > 0.5


def exact(W, H, keep):
    Q = torch.zeros_like(W)
    for r, kept in enumerate(keep):
        Q[r, kept] = torch.linalg.solve(H[kept][:, kept], (W[r] @ H)[kept])
    return Q


def loss(W, Q, H):
    return (((W - Q) @ H) * (W - Q)).sum(1)


def test_it_ends_at_the_exact_solution_and_ten_iterations_come_near_it():
    W, H, keep = problem()
    best = loss(W, exact(W, H, keep), H)
    assert_close(refit(W, W * keep, keep, H, 60), exact(W, H, keep), rtol=1e-4, atol=1e-6)
    assert (loss(W, refit(W, W * keep, keep, H, 10), H) < 1.01 * best).all()


def test_the_loss_of_every_row_falls_with_every_iteration():
    W, H, keep = problem()
    losses = torch.stack([loss(W, refit(W, W * keep, keep, H, n), H) for n in range(12)])
    assert (losses.diff(dim=0) <= 1e-12).all()
    assert (losses[1] < losses[0]).all()


def test_no_iterations_change_nothing_and_nothing_comes_back():
    W, H, keep = problem()
    start = W * keep
    assert torch.equal(refit(W, start, keep, H, 0), start)
    assert (refit(W, start, keep, H, 10)[~keep] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_done_and_rows_without_support_stay_finite(dtype):
    W, H, keep = (t.to(dtype) if t.is_floating_point() else t for t in problem())
    keep[0], keep[1] = True, False
    Q = refit(W, W * keep, keep, H, 200)
    assert Q.isfinite().all()
    assert torch.equal(Q[0], W[0])
    assert (Q[1] == 0).all()
