"""Packed Linears that multiply one tensor make one product, and are given up where they do not."""

import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.quant.packed import PackedLinear, fuse_siblings
from tests.support.packed_linears import quantized_linear


class Attention(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.q, self.k, self.v = (
            PackedLinear.from_quantized(quantized_linear(name, N=16, seed=seed)) for seed, name in enumerate(names)
        )

    def forward(self, x, *, shift_v=False):
        return torch.cat([self.q(x), self.k(x), self.v(x + 1 if shift_v else x)], -1)


def test_a_group_gives_what_its_members_gave():
    layer, x = Attention(["w4 g32"] * 3).eval(), torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = layer(x)
        assert fuse_siblings(layer, x) == [("q", "k", "v")]
        for _ in range(2):
            assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.q.siblings is layer.v.siblings
    assert layer.q.stored("weight_packed").untyped_storage().data_ptr() == (
        layer.k.stored("weight_packed").untyped_storage().data_ptr()
    )


def test_only_equal_schemes_are_stacked():
    layer = Attention(["w4 g32", "w4 g64", "w4 g32"])
    assert fuse_siblings(layer, torch.randn(1, 64)) == [("q", "v")]
    assert layer.k.siblings is None


def test_a_member_that_gets_another_tensor_dissolves_the_group():
    layer, x = Attention(["w4 g32"] * 3).eval(), torch.randn(2, 64)
    with torch.no_grad():
        expected = layer(x, shift_v=True)
        fuse_siblings(layer, x)
        assert_close(layer(x, shift_v=True), expected, rtol=1e-5, atol=1e-5)
    assert layer.q.siblings is layer.k.siblings is layer.v.siblings is None
