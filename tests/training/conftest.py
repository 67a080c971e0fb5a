"""A Slurm job played in one process: its variables, and a scontrol that writes down what it is asked."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

STEP = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "compress", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture
def slurm(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[str]]]:
    """The process is a Slurm task; calling it gives what was asked of scontrol, one line each."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    formers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    yield lambda: (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []
    for number, former in formers.items():
        signal.signal(number, former)
