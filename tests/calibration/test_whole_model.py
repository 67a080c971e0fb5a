"""Forward passes that store the inputs of blocks only: the same gradients, each block computed once more."""

import copy

import torch
from torch import nn

from lightning_compress.calibration.whole_model import checkpointed


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x, *, scale):
        self.calls += 1
        return x + torch.tanh(self.linear(x)) * scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=2.0)
        return x


def gradients(net, x, blocks):
    net.zero_grad()
    with checkpointed(blocks):
        loss = net(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def test_gradients_are_equal_and_blocks_run_twice():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    plain = gradients(net, x, ())
    assert [block.calls for block in net.blocks] == [1, 1, 1]
    again = gradients(net, x, net.blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert [block.calls for block in net.blocks] == [3, 3, 3]


def test_the_blocks_are_as_before_also_after_an_error():
    net = Net()
    own = lambda x, scale: x  # noqa: E731
    net.blocks[1].forward = own
    try:
        with checkpointed(net.blocks):
            assert "forward" in vars(net.blocks[0])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "forward" not in vars(net.blocks[0])
    assert vars(net.blocks[1])["forward"] is own
    assert copy.deepcopy(net).blocks[0].forward.__self__ is not net.blocks[0]
