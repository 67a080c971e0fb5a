"""DistributedDataParallel beside packed Linears: their tensors stay where they are."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress.quant.packed import PackedLinear
from tests.support.packed_linears import quantized_linear
from tests.support.processes import run_processes


class Adapted(nn.Module):
    """Two packed Linears with an adapter, and a buffer of 16 bytes, which DDP does broadcast."""

    def __init__(self):
        super().__init__()
        layers = [PackedLinear.from_quantized(quantized_linear("w4 g32", 64, bias=False, seed=i)) for i in (0, 1)]
        self.layers = nn.Sequential(*layers)
        self.adapter = nn.Linear(64, 64, bias=False)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x):
        return self.layers(x) + self.adapter(x)


def train(rank):
    """Bytes of each broadcast, and the gradient of the adapter."""
    broadcast, sent = dist._broadcast_coalesced, []

    def counted(group, tensors, *rest):
        sent.append(sum(tensor.nbytes for tensor in tensors))
        return broadcast(group, tensors, *rest)

    dist._broadcast_coalesced = counted
    torch.manual_seed(rank)
    model = DistributedDataParallel(Adapted())
    for _ in range(3):
        model(torch.randn(2, 64)).square().sum().backward()
    return sent, model.module.adapter.weight.grad


def test_packed_weights_are_not_broadcast(tmp_path):
    (sent, gradient), (_, other) = run_processes(train, tmp_path / "ranks")
    assert sent == [64 * 64 * 4 + 16, 16, 16, 16]  # the adapter and the buffer at the start, then the buffer
    assert gradient.any()
    assert torch.equal(gradient, other)
