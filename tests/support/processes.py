"""Processes of one group (gloo, on this machine): what each returns, by rank.

They are forked from a server that has only imported: a fork of the tests' own process may hang in torch, where a thread
held a lock.
"""

import faulthandler
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

LONGEST = 90.0
PRELOADED = ["torch.distributed", "lightning_compress.oneshot", "lightning_compress.modifiers.gptq.modifier", "pytest"]


def run_processes(work: Callable[[int], Any], folder: Path, size: int = 2, timeout: float = 60) -> list[Any]:
    """``work(rank)`` in ``size`` processes; what each returned, None for one that ended before.

    Args:
        work: What a rank does; a function of a module, or a partial of one.
        folder: For results; made where it is missing.
        size: Number of processes.
        timeout: Seconds after which a collective of the default group fails.
    """
    folder.mkdir(exist_ok=True)
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _enter, args=(work, folder, size, timeout), nprocs=size, start_method="forkserver"
    )
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _enter(rank: int, work: Callable[[int], Any], folder: Path, size: int, timeout: float) -> None:
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a process that hangs ends, and says where
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def vanish() -> None:
    """End this process as a kill does: nothing is cleaned up, no error is raised."""
    os._exit(0)
