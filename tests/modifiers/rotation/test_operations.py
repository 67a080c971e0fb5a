"""Operations that hand the basis of a tensor on, and those that need it as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.modifiers.rotation.follow import follow


def trace(model):
    ids = torch.arange(12).reshape(2, 6)
    cached = {"use_cache": False} if hasattr(model, "config") else {}
    return follow(model, lambda: model(ids, **cached))


def stream(model):
    return next(space for space in trace(model).spaces if space.sources)


class Net(nn.Module):
    """A stream with one more operation in the middle."""

    def __init__(self, operation=None):
        super().__init__()
        self.table, self.norm, self.operation = nn.Embedding(16, 8), nn.LayerNorm(8), operation
        self.writer, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.writer(torch.relu(self.head(self.norm(x))))
        x = x if self.operation is None else self.operation(self, x)
        return self.head(x)


@pytest.mark.parametrize("operation", [
    lambda net, x: x * 3, lambda net, x: 0.5 * x, lambda net, x: x / 2.0, lambda net, x: x - net.table.weight[0],
    lambda net, x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda net, x: x[:, 1:], lambda net, x: x[0],
    lambda net, x: x.view(-1, 8), lambda net, x: x.unsqueeze(0).squeeze(0), lambda net, x: torch.cat([x, x], 1),
    lambda net, x: x * x.new_ones(2, 6, 1), lambda net, x: F.dropout(x, 0.5, False), lambda net, x: x + net.shift,
    lambda net, x: torch.zeros_like(x).index_add_(0, torch.tensor([1, 0]), x), lambda net, x: x.double().float(),
    lambda net, x: x.masked_fill(torch.zeros(2, 6, 1, dtype=torch.bool), 0), lambda net, x: x.chunk(2, 1)[1],
    lambda net, x: x.flatten(0, 1), lambda net, x: x[x.new_ones(2, 6, dtype=torch.bool)],
])  # fmt: skip
def test_operations_that_treat_all_bases_alike(operation):
    assert stream(Net(operation)).fixed == ""


@pytest.mark.parametrize(("operation", "reason"), [
    (lambda net, x: torch.sigmoid(x), "sigmoid needs it as it is"),
    (lambda net, x: x * net.shift, "mul needs it as it is"),
    (lambda net, x: x + 1, "add of something else needs it"),
    (lambda net, x: x + torch.ones(8), "add of something else needs it"),
    (lambda net, x: x.flip(-1), "flip needs it"),
    (lambda net, x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]], "getitem takes its features apart"),
    (lambda net, x: x.view(2, 6, 2, 4).view(2, 6, 8), "view takes its features apart"),
    (lambda net, x: x.transpose(1, 2).transpose(1, 2), "transpose takes its features apart"),
    (lambda net, x: torch.cat(x.chunk(2, -1), -1), "chunk takes its features apart"),
    (lambda net, x: torch.cat([x, x], -1)[..., :8], "cat needs it"),
    (lambda net, x: x / x.abs(), "abs needs it"),
    (lambda net, x: 1 / (x + x), "needs it as it is"),
    (lambda net, x: x + net.norm(x), "the output of 'norm' is added to it"),
    (lambda net, x: net.norm(net.norm(x)), "'norm' normalizes what 'norm' has normalized"),
    (lambda net, x: F.linear(x, net.writer.weight @ net.head.weight), "multiplied by a weight that is not a parameter"),
    (lambda net, x: x.masked_fill(torch.ones(2, 6, 1, dtype=torch.bool), 2.0), "masked_fill takes its features apart"),
])  # fmt: skip
def test_operations_that_need_the_basis_as_it_is(operation, reason):
    assert reason in stream(Net(operation)).fixed
