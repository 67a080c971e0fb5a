"""Masks remove exactly what was asked for, and the least important of it."""

import pytest
import torch

from lightning_compress.pruning.masks import check_structure, global_masks, keep_mask, keep_rows


@pytest.fixture
def score_RC():
    return torch.randn(12, 24, generator=torch.Generator().manual_seed(0)).abs()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.99])
def test_unstructured_removes_the_exact_count_and_keeps_the_highest(score_RC, sparsity):
    keep = keep_mask(score_RC, sparsity)
    assert (~keep).sum() == int(sparsity * score_RC.numel() + 1e-9)
    if not keep.all():
        assert score_RC[keep].min() >= score_RC[~keep].max()


@pytest.mark.parametrize(("structure", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_n_of_m_keeps_the_n_highest_of_every_m(score_RC, structure, n, m):
    keep, groups = keep_mask(score_RC, 0.5, structure).reshape(-1, m), score_RC.reshape(-1, m)
    assert (keep.sum(1) == n).all()
    for kept, group in zip(keep, groups, strict=True):
        assert set(group[kept].tolist()) == set(group.sort(descending=True).values[:n].tolist())


def test_blocks_and_channels_go_as_one(score_RC):
    tiles = keep_mask(score_RC, 0.5, "block 4x6").reshape(3, 4, 4, 6)
    assert ((tiles.float().mean((1, 3)) == 0) | (tiles.float().mean((1, 3)) == 1)).all()
    rows = keep_mask(score_RC, 0.25, "channel")
    assert (~rows.any(1)).sum() == 3
    assert set(score_RC.mean(1).argsort()[:3].tolist()) == set((~rows.any(1)).nonzero().flatten().tolist())


def test_ties_are_broken_by_position():
    keep = keep_mask(torch.ones(2, 4), 0.5)
    assert torch.equal(keep, torch.tensor([[False] * 4, [True] * 4]))


def test_a_global_ranking_takes_from_where_scores_are_low():
    masks = global_masks({"small": torch.full((2, 4), 0.1), "large": torch.full((2, 4), 9.0)}, 0.5)
    assert not masks["small"].any()
    assert masks["large"].all()


@pytest.mark.parametrize(
    ("structure", "sparsity", "message"),
    [
        ("3:2", None, "keeps 3 of every 2 weights; expected 0 < N < M"),
        ("2:4", 0.7, "has sparsity 0.5, but 0.7 was asked for"),
        ("blocks", None, "is unknown; expected 'unstructured'"),
    ],
)
def test_unknown_structures_are_refused(structure, sparsity, message):
    with pytest.raises(ValueError, match=message):
        check_structure(structure, sparsity)


def test_a_width_that_the_pattern_does_not_divide_is_named():
    with pytest.raises(ValueError, match="2:4 does not divide 10 columns"):
        keep_mask(torch.ones(3, 10), 0.5, "2:4")


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_rows_may_be_ranked_by_themselves(score_RC, sparsity):
    keep = keep_rows(score_RC, sparsity)
    assert ((~keep).sum(1) == int(sparsity * 24 + 1e-9)).all()
    for row, kept in zip(score_RC, keep, strict=True):
        assert torch.equal(kept, keep_mask(row[None], sparsity)[0])
    assert torch.equal(keep_rows(score_RC, 0.5, "2:4"), keep_mask(score_RC, 0.5, "2:4"))
