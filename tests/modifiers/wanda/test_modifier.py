"""Wanda: the scores of the paper, rows ranked by themselves."""

import pytest
import torch
from torch import nn

from lightning_compress import compress
from lightning_compress.modifiers.wanda.modifier import WandaPruningModifier, wanda_mask
from tests.support.pruning_runs import REFUSED, kept_per_group, problem, relative_error
from tests.support.quantization_runs import attention, batches, calibrate, correlated, weights


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.71])
def test_each_row_loses_its_lowest_scores(sparsity):
    W, H = problem(9, 40)
    norm = H.diagonal().sqrt()
    keep = wanda_mask(W, norm, sparsity)
    for w, kept in zip(W, keep, strict=True):
        score = w.abs() * norm
        assert (~kept).sum() == int(sparsity * 40 + 1e-9)
        if not kept.all():
            assert score[kept].min() > score[~kept].max()


@pytest.mark.parametrize(("structure", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_n_of_m_keeps_the_highest_of_every_group(structure, n, m):
    W, H = problem(9, 40)
    norm = H.diagonal().sqrt()
    keep = wanda_mask(W, norm, 0.5, structure).reshape(-1, m)
    assert (keep.sum(1) == n).all()
    for kept, score in zip(keep, (W.abs() * norm).reshape(-1, m), strict=True):
        assert score[kept].min() > score[~kept].max()


def test_zeros_are_kept_and_count():
    W, H = problem(8, 40)
    W[:, ::4] = 0
    keep = wanda_mask(W, H.diagonal().sqrt(), 0.5)
    assert (keep.sum(1) == 20).all()
    assert not keep[:, ::4].any()
    assert torch.equal(wanda_mask(W, H.diagonal().sqrt(), 0.1), W != 0)


def test_columns_without_input_go_first():
    W, norm = torch.randn(5, 8), torch.ones(8)
    norm[[1, 6]] = 0
    assert (wanda_mask(W, norm, 0.25).sum(0) == torch.tensor([5, 0, 5, 5, 5, 5, 0, 5])).all()


def test_weights_that_stay_are_not_changed_and_the_ledger_says_how_far_outputs_moved():
    model, data = attention(), batches()
    before, X = weights(model), torch.cat(data).reshape(-1, 64)
    with pytest.warns(UserWarning, match="WandaPruningModifier: spare never saw data"):
        ledger = calibrate(model, WandaPruningModifier(sparsity=0.5), data)
    H, Q = X.t() @ X / len(X), model.q.weight.detach()
    expected = before["q.weight"] * wanda_mask(before["q.weight"], X.norm(dim=0), 0.5)
    assert torch.equal(Q, expected)
    row = ledger.rows[0]
    assert (row.module, row.technique, row.sparsity, row.tokens) == ("q", "wanda", 0.5, 384)
    assert row.error == pytest.approx(relative_error(before["q.weight"], Q, H), rel=1e-3)
    assert ledger.rows[-1].flags == ["never saw data; left as it was"]


def test_the_refit_keeps_the_mask_and_lowers_the_error():
    plain, refitted, what = attention(), attention(), {"targets": ["q"], "mask_structure": "2:4"}
    one = calibrate(plain, WandaPruningModifier(**what), batches())
    other = calibrate(refitted, WandaPruningModifier(**what, refit_iterations=10), batches())
    assert torch.equal(plain.q.weight == 0, refitted.q.weight == 0)
    assert other.rows[0].error < 0.7 * one.rows[0].error


def test_splitting_the_batches_changes_nothing():
    data, whole, parts = batches(), attention(), attention()
    calibrate(whole, WandaPruningModifier(targets=["q"]), [torch.cat(data)])
    calibrate(parts, WandaPruningModifier(targets=["q"]), [piece for batch in data for piece in batch.split(1)])
    assert torch.equal(whole.q.weight, parts.q.weight)


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
def test_convolutions_in_every_walk(walk):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)))
    modifier = WandaPruningModifier(targets=["Conv2d"], mask_structure="2:4")
    blocks = None if walk == "whole" else ["Sequential"]
    ledger = compress(model, modifier, [torch.randn(3, 4, 9, 9)] * 2, walk=walk, blocks=blocks)
    assert [row.sparsity for row in ledger] == [0.5, 0.5]
    assert all((kept_per_group(m.weight, 4) == 2).all() for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WandaPruningModifier(**arguments)


def test_a_width_that_the_pattern_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"'4:8' does not divide the columns of 0 \(10\)"):
        compress(nn.Sequential(nn.Linear(10, 4)), WandaPruningModifier(mask_structure="4:8"), [correlated(8, 10)])
