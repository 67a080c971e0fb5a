"""The op against every order of four numbers, and against the masks that pruning makes."""

from itertools import product

import pytest
import torch

from lightning_compress.ops.mask_2of4 import mask_2of4
from lightning_compress.pruning.masks import keep_mask

ORDERS = torch.tensor(list(product([-1.0, 0.0, 0.5, 2.0, torch.nan, torch.inf], repeat=4)))  # with ties and NaN


def test_two_of_four_stay_and_they_are_the_highest():
    mask = mask_2of4(ORDERS)
    assert (mask.sum(1) == 2).all()
    finite = ~ORDERS.isnan().any(1)
    lowest_kept = torch.where(mask, ORDERS, torch.inf).amin(1)[finite]
    highest_dropped = torch.where(mask, -torch.inf, ORDERS).amax(1)[finite]
    assert (lowest_kept >= highest_dropped).all()


def test_masks_are_those_of_pruning():
    score = torch.randn(7, 24)
    for s in (score, score.round(), score.t().contiguous().view(-1, 4)):
        assert torch.equal(mask_2of4(s), keep_mask(s, 0.5, "2:4"))


def test_op_is_registered_soundly():
    torch.library.opcheck(torch.ops.lightning_compress.mask_2of4, (torch.randn(3, 8),))


@pytest.mark.parametrize("score", [torch.zeros(2, 6), torch.zeros(8), torch.zeros(2, 8).int()])
def test_what_does_not_fit_is_refused(score):
    with pytest.raises(ValueError, match=r"expected floating scores \[R, C\], C a multiple of 4, got"):
        mask_2of4(score)
