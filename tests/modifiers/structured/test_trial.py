"""A cut that the forward pass does not survive is refused before anything is cut, and the layers are named."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import StructuredPruningModifier, compress

pytest.importorskip("torch_pruning")


class FusedAttention(nn.Module):
    """Queries, keys and values from one Linear, split by sizes that forward computes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(8, 16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.emb(x)
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, C).unbind(2)
        return self.head(x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))


class FixedView(nn.Module):
    """A size that is written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 2)

    def forward(self, x):
        h = self.body(x).view(len(x), 16)
        return self.head(torch.relu(self.other(h)))


def channels(**arguments):
    return StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, **arguments)


@pytest.mark.parametrize("ignore", [[], ["qkv"]])
def test_a_fused_projection_is_refused_with_names(ignore):
    model = FusedAttention()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'(emb|qkv)'.*add .*'(emb|qkv)'.* to ignore"):
        compress(model, channels(input_shape=[4, 8], ignore=ignore))
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_size_that_forward_fixes_is_refused_and_only_its_maker_named():
    with pytest.raises(ValueError, match=r"of 'body' the model does not run as before: shape.*add 'body' to ignore"):
        compress(FixedView(), channels(input_shape=[8]))


def test_the_advice_can_be_followed():
    model = FixedView()
    compress(model, channels(input_shape=[8], ignore=["body"]))
    assert model.other.out_features == 6
    assert model(torch.randn(3, 8)).shape == (3, 2)


def test_the_trial_leaves_modes_and_random_state_alone():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)).train()
    state = torch.get_rng_state()
    compress(model, channels(input_shape=[8]))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[0].out_features == 8
