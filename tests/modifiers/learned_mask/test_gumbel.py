"""Masks that keep N of M, chosen with gradients."""

from itertools import product

import torch
from torch.testing import assert_close

from lightning_compress.modifiers.learned_mask.gumbel import gumbel, hard_mask, patterns, prior_shift, soft_mask


def test_the_patterns_are_all_masks_that_keep_n_of_m():
    expected = {bits for bits in product((0.0, 1.0), repeat=4) if sum(bits) == 2}
    assert {tuple(row) for row in patterns(2, 4).tolist()} == expected
    assert patterns(4, 8).shape == (70, 8)


def test_gumbel_noise_makes_softmax_a_choice_with_its_probabilities():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 0.0])
    noise = gumbel((40000, 6), 3, torch.device("cpu"))
    chosen = (logits + noise).argmax(1).bincount(minlength=6) / 40000
    assert_close(chosen, logits.softmax(0), atol=0.01, rtol=0)
    assert torch.equal(noise, gumbel((40000, 6), 3, torch.device("cpu")))
    assert not torch.equal(noise, gumbel((40000, 6), 4, torch.device("cpu")))


def test_a_cold_soft_mask_is_a_hard_one():
    S, one = patterns(2, 4), torch.ones(())
    logits, none = torch.randn(5, 3, 6), torch.zeros(5, 3, 6)
    assert_close(soft_mask(logits, none, one, 1e-4 * one, S), hard_mask(logits, S).float(), atol=1e-3, rtol=0)
    assert_close(soft_mask(logits, none, one, 1e4 * one, S), torch.full((5, 12), 0.5), atol=1e-3, rtol=0)


def test_the_prior_favours_its_pattern_and_what_is_like_it():
    S = patterns(2, 4)
    for k, mask in enumerate(S):
        shift = prior_shift(mask[None] > 0, S)[0, 0]
        assert shift.argmax() == k
        assert shift.sum() == 0
        assert sorted(shift.tolist()) == [-1, 0, 0, 0, 0, 1]  # the opposite pattern, and the four between
