"""A sweep by submitit: its config, and (markers slow, slurm) its jobs, one of which is preempted.

scripts/local_slurm/up.sh starts a cluster here (make test-slurm-local); the local executor needs none.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
DEMO = [
    "logger=none", "~callbacks.progress_bar", "+trainer.enable_progress_bar=false", "trainer.max_epochs=1",
    "model.hidden_size=128", "model.intermediate_size=128", "model.num_heads=2", "model.num_layers=1",
    "data.block_length=32", "data.batch_size=4", "data.train_blocks=64",
    "data.val_blocks=16", "data.test_blocks=16",
    "data.calibration_blocks=8", "+callbacks.compress.calibration_batches=2", "+callbacks.compress.verify=false",
]  # fmt: skip
RECIPES = ["gptq_w4", "[smoothquant,gptq_w8a8]"]

SLOW = '''
"""A step that waits, so that a signal finds the job there; the second attempt does not wait."""

import os
import time
from pathlib import Path

from lightning import Callback


class SlowStep(Callback):
    def on_train_batch_start(self, trainer, *args):
        first = Path(trainer.default_root_dir) / "first_attempt"
        if trainer.global_step == 5 and not first.exists():
            first.touch()
            print("a slow step in process", os.getpid(), flush=True)
            for _ in range(50):
                time.sleep(0.1)
'''


# -- the config --------------------------------------------------------------------------------------------------


needs_submitit = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="needs the extra slurm"
)


def composed(monkeypatch: pytest.MonkeyPatch, *overrides: str, **variables: str) -> DictConfig:
    """The config of ``train.py -m`` under the given SLURM variables and no others."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose("train", overrides=[*overrides, "task_name=train"], return_hydra_config=True)


@needs_submitit
def test_the_launcher_requeues_at_the_time_limit_and_gives_back_a_failed_jobs_nodes(monkeypatch):
    launcher = composed(monkeypatch, "hydra/launcher=slurm", "hydra.launcher.partition=gpu").hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert launcher.max_num_timeout > 0, "submitit's own default ends the job there"
    assert launcher.additional_parameters == {"requeue": True}
    assert launcher.setup == ["export SLURM_KILL_BAD_EXIT=1"]
    assert launcher.partition == "gpu"


JOB = {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}


@needs_submitit
@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
def test_no_job_id_names_the_folder_of_a_sweep_that_is_submitted_from_outside(monkeypatch, launcher):
    """Each job composes the config again: its own id would give it a folder of its own."""
    folder = composed(monkeypatch, "trainer=slurm", f"hydra/launcher={launcher}", **JOB).hydra.sweep.dir
    assert re.fullmatch(r"logs/train/multiruns/\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}", folder)


def test_a_sweep_inside_one_job_is_named_by_it(monkeypatch):
    assert composed(monkeypatch, "trainer=slurm", **JOB).hydra.sweep.dir == "logs/train/slurm/77/3"


# -- jobs --------------------------------------------------------------------------------------------------------


def sweep(folder: Path, *overrides: str, **variables: str) -> "subprocess.Popen[str]":
    """``train.py -m`` over two recipes, from a folder with a space in its name; ends when its jobs have."""
    (folder / "slow.py").write_text(SLOW)
    command = [sys.executable, str(ROOT / "train.py"), "-m", *DEMO, f"+compress={','.join(RECIPES)}", *overrides]
    environ = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", **variables}
    output = (folder / "output.txt").open("a")
    return subprocess.Popen(
        [*command, "hydra.sweep.dir=sweep"], cwd=folder, env=environ, text=True, stdout=output, stderr=output
    )


def assert_reported(folder: Path) -> None:
    with (folder / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["compress"], row["fault"]) for row in rows] == [
        (str(number), recipe, "") for number, recipe in enumerate(RECIPES)
    ]
    for row in rows:
        model = folder / "sweep" / row["job"] / "compressed" / "model.safetensors"
        assert int(row["size"]) == model.stat().st_size
    assert "results of 2 of 2 jobs; perplexity" in (folder / "output.txt").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder"
    path.mkdir()
    return path


@needs_submitit
@pytest.mark.slow
def test_submitits_local_executor_runs_a_sweep_without_a_cluster(folder: Path):
    """The signal of its time limit comes to one of the jobs, which run side by side."""
    process = sweep(folder, "trainer=cpu", "hydra/launcher=submitit_local", "+callbacks.slow._target_=slow.SlowStep")
    try:
        until(lambda: slow_steps(folder, "*"), "a step", folder)
        log, number = slow_steps(folder, "*")[0]
        os.kill(number, signal.SIGUSR2)
        assert process.wait(200) == 0, (folder / "output.txt").read_text()[-4000:]
    finally:
        process.kill()
    assert_reported(folder)
    assert_went_on(log)


TASK = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "compress", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.mark.slow
def test_a_sweep_inside_one_job_that_is_requeued_goes_on_with_the_run_that_was_signalled(folder: Path):
    """A Slurm job played in one process: its variables, and a scontrol that does nothing."""
    (folder / "scontrol").symlink_to("/bin/true")
    settings = ["trainer=slurm", "trainer.accelerator=cpu", "+callbacks.slow._target_=slow.SlowStep"]
    variables = {**TASK, "PATH": f"{folder}:{os.environ['PATH']}"}
    output = folder / "output.txt"
    process = sweep(folder, *settings, **variables)
    until(lambda: output.read_text().count("a slow step") == 2, "the step of the second run", folder)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(100) == 143, output.read_text()[-4000:]
    assert sweep(folder, *settings, **variables, SLURM_RESTART_COUNT="1").wait(200) == 0, output.read_text()[-4000:]
    assert_reported(folder)
    _, second = output.read_text().split("SIGUSR1: this run ends here")
    for job in "01":
        assert f"Restored all states from the checkpoint at {folder}/sweep/{job}/hpc_ckpt_1.ckpt" in second
    assert re.findall(r"compressed model: (.*)", second) == [f"{folder}/sweep/1/compressed"]


def slow_steps(folder: Path, job: str) -> list[tuple[Path, int]]:
    """(log, process) of each task of submitit's job that is at its slow step or beyond."""
    logs = {path: path.read_text() for path in (folder / "sweep" / ".submitit").glob(f"{job}/*.out")}
    matches = {path: re.search(r"a slow step in process (\d+)", text) for path, text in logs.items()}
    return [(path, int(match[1])) for path, match in matches.items() if match]


def assert_went_on(log: Path) -> None:
    """The second attempt resumed from what the first one saved, and exported once."""
    _, second = log.read_text().split("SIGUSR2: this run ends here")
    (checkpoint,) = re.findall(r"Restored all states from the checkpoint at (.*hpc_ckpt_1.ckpt)", second)
    assert "a slow step" not in second
    assert second.count(f"compressed model: {Path(checkpoint).with_name('compressed')}") == 1


def until(met: Callable[[], object], what: str, folder: Path, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not list(folder.glob("sweep/sweep.csv")):
        if met():
            return
        time.sleep(0.25)
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("sweep/.submitit/*/*.out"))
    raise AssertionError(f"waited up to {seconds} s for {what}:\n{(folder / 'output.txt').read_text()[-3000:]}\n{logs}")


@needs_submitit
@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_of_a_sweep_that_reaches_its_limit_is_requeued_and_goes_on(folder: Path):
    """Two ranks on two nodes for each job; submitit takes a job of at most ten minutes for timed out at any signal."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("no Slurm answers sinfo; make test-slurm-local starts one on this machine")
    settings = [f"hydra.launcher.{setting}" for setting in ("nodes=2", "timeout_min=10", "cpus_per_task=1")]
    slurm = ["trainer=slurm", "trainer.accelerator=cpu", "hydra/launcher=slurm", *settings]
    process = sweep(folder, *slurm, "+callbacks.slow._target_=slow.SlowStep")
    jobs = folder / "sweep" / ".submitit"
    try:
        until(lambda: slow_steps(folder, "*_0"), "a step", folder)
        job = next(jobs.glob("*_0")).name

        def status() -> str:
            return subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout

        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        until(lambda: "JobState=PENDING" in status(), "the requeue", folder, seconds=60)
        assert "Restarts=1" in status()
        time.sleep(2)  # a credential issued in the second of the requeue is taken for a revoked one
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)
        assert process.wait(200) == 0, (folder / "output.txt").read_text()[-4000:]
    finally:
        process.kill()
        subprocess.run(["scancel", "--name=train"], check=False)
    assert_reported(folder)
    assert_went_on(next(jobs.glob("*_0/*_0_log.out")))
