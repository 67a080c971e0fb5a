"""Work of rank 0 alone."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from lightning_compress.training.rank_zero import alone, send_tensors


def test_without_a_group_it_just_runs():
    assert alone(lambda: 5, "work") == 5
    send_tensors(nn.Linear(2, 2))


def two_processes(function, folder):
    torch.multiprocessing.start_processes(enter, args=(function, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def enter(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=3)
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def slow(rank):
    def work():
        time.sleep(4)  # longer than the group's timeout
        return {"from": rank}

    return alone(work, "work")


def test_the_others_wait_longer_than_the_groups_timeout_and_get_the_result(tmp_path):
    assert two_processes(slow, tmp_path) == [{"from": 0}, {"from": 0}]


def failing(rank):
    def work():
        raise ArithmeticError("singular")

    try:
        alone(work, "calibration")
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_failure_reaches_all(tmp_path):
    zero, one = two_processes(failing, tmp_path)
    assert zero == ("ArithmeticError", "singular")
    assert one == ("RuntimeError", "calibration failed on rank 0: ArithmeticError: singular")


def deserted(rank):
    def work():
        time.sleep(1)
        raise SystemExit(143)

    if rank == 1:
        threading.Timer(0.3, os._exit, (0,)).start()  # ended while it waits
    try:
        alone(work, "calibration")
    except SystemExit as stop:
        return stop.code


def test_rank_0_keeps_its_own_error_when_the_others_are_gone(tmp_path):
    torch.save(None, tmp_path / "1.pt")
    assert two_processes(deserted, tmp_path) == [143, None]


def sharing(rank):
    module = nn.BatchNorm1d(2)
    module.running_mean += rank
    module.weight.data += rank
    module.num_batches_tracked += rank
    send_tensors(module)
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def test_every_rank_gets_the_tensors_of_rank_0(tmp_path):
    zero, one = two_processes(sharing, tmp_path)
    assert zero == one
    assert one["running_mean"] == [0, 0]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes and OpenMP threads do not mix
    yield
    torch.set_num_threads(threads)
