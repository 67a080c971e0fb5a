"""SIGTERM to either of two ranks that Lightning's own launcher has started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ended(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["training", "calibration"])
def test_both_ranks_leave_with_that_code(tmp_path, phase, rank):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.launched_run", str(tmp_path), phase]
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / f"{phase} 0").exists():
        assert run.poll() is None, run.communicate()[1].decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = [int((tmp_path / f"rank {number}").read_text()) for number in (0, 1)]
    os.kill(processes[rank], signal.SIGTERM)
    assert run.wait(60) == 143
    while not ended(processes[1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists() == (phase == "training")
    assert not (tmp_path / "compressed").exists()
