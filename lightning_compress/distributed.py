"""What the processes of a training run tell one another: sums, tensors, values. No-ops without a group."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["active", "all_reduce_", "broadcast_", "gather", "rank", "world_size"]

_OPS = {"sum": "SUM", "max": "MAX", "min": "MIN"}


def active() -> bool:
    """True when a process group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """How many processes work together; 1 without a group."""
    return dist.get_world_size() if active() else 1


def all_reduce_(statistic: Any) -> None:
    """Combine a statistic over ranks in place, as its ``reduce`` mapping (attribute -> sum, max or min) declares.

    All ranks must call it for the same statistics in the same order. Numbers are combined as float64 tensors.
    """
    if world_size() == 1:
        return
    for attribute, operation in statistic.reduce.items():
        value = getattr(statistic, attribute)
        sent = _on_the_wire(value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64))
        dist.all_reduce(sent, op=getattr(dist.ReduceOp, _OPS[operation]))
        if isinstance(value, Tensor):
            value.copy_(sent)
        else:
            setattr(statistic, attribute, type(value)(sent.item()))


def broadcast_(tensors: Sequence[Tensor], source: int) -> None:
    """Send tensors of rank ``source`` to all others, in place."""
    if world_size() > 1:
        for tensor in tensors:
            sent = _on_the_wire(tensor)
            dist.broadcast(sent, src=source)
            tensor.copy_(sent)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank; they are pickled. Every rank calls this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _on_the_wire(tensor: Tensor) -> Tensor:
    """Contiguous, and on the accelerator where the backend (NCCL) knows no other place."""
    return (tensor.cuda() if dist.get_backend() == "nccl" else tensor).contiguous()
