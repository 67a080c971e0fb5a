"""Statistics of channels: batches may be cut anywhere, ranks combine as they declare."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.modifiers.smoothing.statistics import ChannelMax, ChannelMean, to_source

KINDS = {ChannelMax: lambda x: x.abs().amax(0), ChannelMean: lambda x: x.abs().mean(0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splitting_the_batch_changes_nothing(kind, dtype):
    x = torch.randn(60, 8).to(dtype)
    at_once, pieces = kind(8), kind(8)
    at_once.update(x)
    for piece in x.split([7, 0, 23, 30]):
        pieces.update(piece)
    assert_close(at_once.value(), pieces.value())
    assert_close(at_once.value(), KINDS[kind](x.float()))
    assert pieces.tokens == 60


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind):
    x = torch.randn(60, 8)
    ranks = [kind(8), kind(8)]
    ranks[0].update(x[:13])
    ranks[1].update(x[13:])
    for name, how in kind.reduce.items():
        one, two = (torch.as_tensor(getattr(rank, name)) for rank in ranks)
        setattr(ranks[0], name, torch.maximum(one, two) if how == "max" else one + two)
    assert_close(ranks[0].value(), KINDS[kind](x))


def test_channels_that_share_a_source_are_joined():
    index = torch.tensor([0, 1, 0, -1, 2, 1])
    values = torch.tensor([1.0, 2.0, 5.0, 100.0, 4.0, 6.0])
    other = (torch.tensor([2, -1]), torch.tensor([8.0, 50.0]))
    assert_close(to_source([(index, values)], 4, "amax"), torch.tensor([5.0, 6.0, 4.0, 0.0]))
    assert_close(to_source([(index, values), other], 3, "mean"), torch.tensor([3.0, 4.0, 6.0]))
