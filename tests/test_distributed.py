"""Statistics over two ranks (gloo processes on this machine), and everything a no-op without a group."""

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_compress import distributed


class Statistic:
    reduce = {"sum_C": "sum", "largest": "max", "smallest": "min", "count": "sum"}

    def __init__(self, x_NC: torch.Tensor):
        self.sum_C = x_NC.sum(0)
        self.largest = x_NC.max()
        self.smallest = float(x_NC.min())
        self.count = x_NC.shape[0]


def _worker(rank: int, port: int, work: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def on_two_ranks(work: Callable[[int], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_worker, args=(port, work), nprocs=2, start_method="fork")


def everything(rank: int) -> None:
    assert (distributed.active(), distributed.rank(), distributed.world_size()) == (True, rank, 2)
    x_NC = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))

    whole, part = Statistic(x_NC), Statistic(x_NC[:7] if rank == 0 else x_NC[7:])
    kept = part.sum_C
    distributed.all_reduce_(part)
    torch.testing.assert_close(part.sum_C, whole.sum_C)
    assert part.sum_C is kept  # in place
    assert part.largest == whole.largest
    assert part.smallest == whole.smallest
    assert part.count == 30
    assert type(part.count) is int

    part.sum_C = torch.full((2, 3), float(rank + 1)).T  # not contiguous
    distributed.all_reduce_(part)
    assert part.sum_C.tolist() == [[3, 3]] * 3

    tensors = [torch.full((2,), float(rank)), torch.full((3, 2), rank, dtype=torch.int8).T]
    distributed.broadcast_(tensors, source=1)
    assert all((tensor == 1).all() for tensor in tensors)


def test_two_ranks_agree_with_one():
    on_two_ranks(everything)


def test_without_a_group_nothing_happens():
    assert (distributed.active(), distributed.rank(), distributed.world_size()) == (False, 0, 1)
    x_NC = torch.randn(5, 3)
    one, two = Statistic(x_NC), Statistic(x_NC)
    distributed.all_reduce_(one)
    distributed.broadcast_([x_NC], source=0)
    assert one.count == 5
    assert torch.equal(one.sum_C, two.sum_C)
