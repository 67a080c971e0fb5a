"""SparseGPT against optimal brain surgeon with an explicit inverse, against other prunings, and in the walk."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.layerwise.factor import factorize
from lightning_compress.layerwise.least_squares_refit import refit
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier, prune_columns
from lightning_compress.modifiers.wanda.modifier import wanda_mask
from lightning_compress.pruning.masks import keep_mask
from tests.support.pruning_runs import kept_per_group, problem, relative_error
from tests.support.quantization_runs import attention, batches, calibrate, correlated, weights

F64 = torch.float64


def damped(H: Tensor, fraction: float = 0.01) -> Tensor:
    return H + fraction * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def surgeon(W: Tensor, H: Tensor, sparsity: float, block: int, pattern: tuple[int, int] | None, scope: str) -> Tensor:
    """Columns from left to right; the inverse of what is left of H is taken anew each time, weights updated at once."""
    R, C = W.shape
    V, keep = W.clone(), torch.ones(R, C, dtype=torch.bool)
    width = pattern[1] if pattern else block
    for j in range(C):
        if j % width == 0:
            high = min(j + width, C)
            scores = torch.stack([V[:, c] ** 2 / torch.linalg.inv(H[c:, c:])[0, 0] for c in range(j, high)], 1)
            if pattern:
                lowest = scores.argsort(1)[:, : pattern[1] - pattern[0]]
                keep[:, j:high].scatter_(1, lowest, False)
            elif scope == "row":
                lowest = scores.argsort(1)[:, : int(sparsity * high + 1e-9) - int(sparsity * j + 1e-9)]
                keep[:, j:high].scatter_(1, lowest, False)
            else:
                count = int(sparsity * R * high + 1e-9) - int(sparsity * R * j + 1e-9)
                threshold = scores.flatten().sort().values[count]
                keep[:, j:high] = scores >= threshold
        inverse = torch.linalg.inv(H[j:, j:])
        error = torch.where(keep[:, j], 0.0, V[:, j])
        V[:, j:] -= (error / inverse[0, 0])[:, None] * inverse[0]
        V[:, j] = torch.where(keep[:, j], V[:, j], 0.0)
    return V


@pytest.mark.parametrize("scope", ["block", "row"])
@pytest.mark.parametrize(
    ("structure", "block"), [(None, 8), (None, 3), (None, 1), ((2, 4), 8), ((1, 4), 4), ((1, 2), 8)]
)
def test_equals_brute_force_optimal_brain_surgeon(structure, block, scope):
    W, H = problem(8, 8)
    Q, keep = prune_columns(W, factorize(H, 0.01, False), 0.5, structure, block, scope)
    assert_close(Q, surgeon(W, damped(H), 0.5, block, structure, scope))
    assert torch.equal(Q != 0, keep)


@pytest.mark.parametrize("block", [16, 40, 128])
def test_wide_matrices_equal_it_too(block):
    W, H = problem(6, 80)
    Q, _ = prune_columns(W, factorize(H, 0.01, False), 0.6, None, block, "block")
    assert_close(Q, surgeon(W, damped(H), 0.6, block, None, "block"))


def test_for_n_of_m_the_block_changes_nothing():
    W, H = problem(8, 96)
    factor = factorize(H, 0.01, False)
    whole, ours = (prune_columns(W, factor, 0.5, (2, 4), block)[0] for block in (96, 8))
    assert_close(ours, whole)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.95])
@pytest.mark.parametrize("columns", [17, 64, 200])
def test_exact_counts(columns, sparsity):
    W, H = problem(7, columns)
    factor = factorize(H, 0.01, False)
    assert (prune_columns(W, factor, sparsity)[0] == 0).sum() == int(sparsity * W.numel() + 1e-9)
    rows = (prune_columns(W, factor, sparsity, scope="row")[0] == 0).sum(1)
    assert (rows == int(sparsity * columns + 1e-9)).all()


@pytest.mark.parametrize(
    ("pattern", "block"), [((2, 4), 128), ((4, 8), 128), ((1, 4), 4), ((5, 16), 16), ((16, 32), 64)]
)
def test_n_of_m_holds_in_every_group(pattern, block):
    W, H = problem(9, 64)
    Q, _ = prune_columns(W, factorize(H, 0.01, False), 0.5, pattern, block)
    assert (kept_per_group(Q, pattern[1]) == pattern[0]).all()


def test_zeros_are_kept_and_count():
    W, H = problem(12, 64)
    W[:, ::3], W[4] = 0, 0
    zeros, factor = W == 0, factorize(H, 0.01, False)
    for scope in ("block", "row"):
        Q, _ = prune_columns(W, factor, 0.3, scope=scope)  # more zeros there than asked for
        assert torch.equal(Q == 0, zeros)
        assert_close(Q, W)  # and nothing to make up for
        Q, _ = prune_columns(W, factor, 0.7, scope=scope)
        assert (Q[zeros] == 0).all()
    assert (kept_per_group(prune_columns(W, factor, 0.5, (2, 4))[0], 4) <= 2).all()


def test_columns_without_input_go_first_and_tell_nothing():
    W, H = problem(8, 32)
    H[:, 3] = H[3] = H[:, 20] = H[20] = 0
    Q, _ = prune_columns(W, factorize(H, 0.01, False), 0.5)
    assert (Q[:, [3, 20]] == 0).all()
    assert Q.isfinite().all()


@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")])
def test_sparsegpt_beats_wanda_beats_magnitude_and_the_refit_beats_all(sparsity, structure):
    """Held-out inputs of the same kind. Errors at 50 %: magnitude .070, Wanda .013, SparseGPT .008, refitted .006."""
    W, H = problem(64, 128, dtype=torch.float32)
    _, held_out = problem(64, 128, seed=1, dtype=torch.float32)
    pattern = (2, 4) if structure == "2:4" else None
    factor = factorize(H, 0.01, False)
    swept, keep = prune_columns(W, factor, sparsity, pattern)
    magnitude = W * keep_mask(W.abs(), sparsity, structure)
    wanda = W * wanda_mask(W, H.diagonal().sqrt(), sparsity, structure)
    refitted = refit(W, swept, keep, damped(H), 10)
    errors = [relative_error(W, Q, held_out) for Q in (refitted, swept, wanda, magnitude)]
    assert errors == sorted(errors), errors
    assert errors[0] < 0.95 * errors[1] < 0.8 * errors[2]


def test_every_target_is_pruned_and_the_ledger_says_how():
    model, data = attention(), batches()
    before, hidden = weights(model), torch.cat(data).reshape(-1, 64)
    with pytest.warns(UserWarning, match="SparseGPTModifier: spare never saw data"):
        ledger = calibrate(model, SparseGPTModifier(sparsity=0.5), data)
    rows = {row.module: row for row in ledger}
    assert list(rows) == ["q", "k", "v", "o", "spare"]
    q = rows["q"]
    assert (q.technique, q.sparsity, q.tokens, q.params) == ("sparsegpt", 0.5, 384, 4096)
    H = hidden.t() @ hidden / len(hidden)
    assert q.error == pytest.approx(relative_error(before["q.weight"], model.q.weight.detach(), H), rel=1e-3)
    assert q.sqnr_db is not None
    assert q.seconds > 0
    assert rows["spare"].flags == ["never saw data; left as it was"]
    assert torch.equal(model.spare.weight, before["spare.weight"])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_the_refit_it_is_the_paper():
    model, data = attention(), batches()
    W, X = model.q.weight.detach().clone(), torch.cat(data).reshape(-1, 64)
    calibrate(model, SparseGPTModifier(targets=["q"], refit_iterations=0), data)
    expected = surgeon(W.double(), damped((X.t() @ X / len(X)).double()), 0.5, 128, None, "block")
    assert_close(model.q.weight.detach(), expected.float(), rtol=1e-2, atol=1e-3)


def test_h_that_is_not_positive_definite():
    few = [correlated(8, 64).view(1, 8, 64)]
    with pytest.raises(ValueError, match=r"H of 'q' is not positive definite with dampening_frac=0 \(8 tokens for 64"):
        calibrate(attention(), SparseGPTModifier(targets=["q"], dampening_frac=0), few)
    model = attention()
    ledger = calibrate(model, SparseGPTModifier(targets=["q"], dampening_frac=0, on_failure="retry"), few)
    assert ledger.rows[0].flags == ["damping raised to 0.01"]
    assert (model.q.weight == 0).sum() == 2048
