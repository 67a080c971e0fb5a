"""Two ranks on the CPU, forked from the test: no process imports anything anew, and none outlives its time.

Lightning's own ``ddp_fork`` sends weights back to a dense main process, and recipes that change shapes refuse it; here
both ranks are started from outside, as by torchrun or SLURM.
"""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def run_two_ranks(work: Callable[[int], None], folder: Path, seconds: float) -> list[str]:
    """Run ``work(rank)`` in two processes; a traceback per rank, empty where all went well, else ``timed out``.

    Args:
        work: What a rank does; it joins the group by Lightning's ``strategy="ddp", devices=2``.
        folder: For tracebacks.
        seconds: After that both are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(work, rank, port, folder) for rank in (0, 1)]
    ends: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    while len(ends) < 2 and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            if rank not in ends and os.waitpid(child, os.WNOHANG)[0]:
                told = folder / f"failed{rank}.txt"
                ends[rank] = told.read_text() if told.exists() else ""
        time.sleep(0.02)
    for rank, child in enumerate(children):
        if rank not in ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [ends.get(rank, "timed out") for rank in (0, 1)]


def _fork(work: Callable[[int], None], rank: int, port: int, folder: Path) -> int:
    if child := os.fork():
        return child
    try:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        os.environ.update(address)
        work(rank)
    except BaseException:
        (folder / f"failed{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)
