"""Work of rank zero alone, for which the other ranks wait without a time limit.

A barrier of the training's process group fails after 30 minutes (NCCL: 10), and calibration may take longer. So the
ranks wait in a separate gloo group whose timeout is a year; when rank zero fails or dies, they fail, too.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from lightning_compress import distributed
from lightning_compress.distributed import broadcast_

__all__ = ["alone", "send_tensors"]

T = TypeVar("T")
NO_TIMEOUT = timedelta(days=365)


def alone(work: Callable[[], T], what: str) -> T:
    """Run ``work`` on rank zero and send its result (pickled) to every rank; a single process just runs it.

    Args:
        work: Called without arguments on rank zero.
        what: Name of the work, for the message of the other ranks when it fails.

    Raises:
        RuntimeError: On the other ranks, when rank 0 failed; rank 0 raises its own error.
    """
    if distributed.world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
    try:
        return _result(work, what, group)
    finally:
        dist.destroy_process_group(group)


def send_tensors(module: nn.Module) -> None:
    """Every rank gets the parameters and buffers of rank 0."""
    broadcast_([t.data for t in (*module.parameters(), *module.buffers())], source=0)


def _result(work: Callable[[], T], what: str, group: Any) -> T:
    if distributed.rank() == 0:
        try:
            result = work()
        except BaseException as error:
            with suppress(RuntimeError):  # the others may have ended, as after SIGTERM to all: raise this error
                dist.broadcast_object_list([False, f"{type(error).__name__}: {error}"], src=0, group=group)
            raise
        dist.broadcast_object_list([True, result], src=0, group=group)
        return result
    message: list[Any] = [None, None]
    dist.broadcast_object_list(message, src=0, group=group)
    succeeded, result = message
    if not succeeded:
        raise RuntimeError(f"{what} failed on rank 0: {result}")
    return result
