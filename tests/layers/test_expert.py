"""A projection of one expert is a view of the fused tensor, and knows which tokens it gets."""

import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.layers.expert import ExpertLinear, mark_tokens, tokens_of


def test_it_multiplies_its_slice_and_writes_go_into_the_fused_tensor():
    home = nn.Module()
    home.fused = nn.Parameter(torch.randn(3, 6, 4))
    up = ExpertLinear(home, "fused", 1, (2, 6))
    x = torch.randn(5, 4)
    assert (up.in_features, up.out_features) == (4, 4)
    assert_close(up(x), x @ home.fused[1, 2:6].T)
    assert list(up.parameters()) == []
    up.weight.data.zero_()
    assert (home.fused[1, 2:6] == 0).all()
    assert (home.fused[1, :2] != 0).all()
    home.fused = nn.Parameter(torch.ones(3, 6, 4))  # another tensor under the name
    assert torch.equal(up.weight, torch.ones(4, 4))
    up(x).sum().backward()
    assert_close(home.fused.grad[1, 2:6], x.sum(0).expand(4, 4))
    assert (home.fused.grad[0] == 0).all()


def test_tokens_are_noted_on_the_rows():
    x, tokens = torch.zeros(2, 4), torch.tensor([3, 7])
    assert tokens_of(x) is None
    assert tokens_of(mark_tokens(x, tokens)) is tokens
