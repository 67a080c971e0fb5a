"""Processes of one group (gloo, on this machine), forked from the test: what each returns, by rank."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_processes(work: Callable[[int], Any], folder: Path, size: int = 2, timeout: float = 60) -> list[Any]:
    """``work(rank)`` in ``size`` processes; what each returned, None for one that ended before.

    Args:
        work: What a rank does.
        folder: An empty folder for results.
        size: Number of processes.
        timeout: Seconds after which a collective of the default group fails.
    """
    torch.multiprocessing.start_processes(_enter, args=(work, folder, size, timeout), nprocs=size, start_method="fork")
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _enter(rank: int, work: Callable[[int], Any], folder: Path, size: int, timeout: float) -> None:
    torch.set_num_threads(1)  # forked processes and OpenMP threads do not mix
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def vanish() -> None:
    """End this process as a kill does: nothing is cleaned up, no error is raised."""
    os._exit(0)
