"""SLURM: what lightning_compress/slurm.py checks, `trainer=slurm`, the batch scripts, and (marker slurm) jobs.

The jobs need a cluster that answers `sinfo`; scripts/local_slurm/up.sh starts one here (make test-slurm-local).
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_compress.slurm import check_tasks

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"

STEP = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "compress", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


def step_of(tasks: int, **others: str) -> dict[str, str]:
    """What srun gives a task: a step of so many tasks on one node."""
    counts = dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), str(tasks))
    return {**STEP, "SLURM_NNODES": "1", **counts, **others}


# -- world_size == SLURM_NTASKS ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "environ"),
    [
        (1, {}),
        (4, {}),
        (2, step_of(2)),
        (1, step_of(1)),
        (1, {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "compress"}),
        (1, {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "interactive"}),
        (8, step_of(2, TORCHELASTIC_RUN_ID="none")),
    ],
    ids=["no slurm", "no slurm, 4", "2 of 2", "1 of 1", "one task, no srun", "interactive", "torchrun in each task"],
)
def test_one_run_of_all_tasks_passes(world_size: int, environ: dict[str, str]):
    check_tasks(world_size, environ)


def test_tasks_that_would_train_alone_are_refused():
    with pytest.raises(ValueError, match=r"2 tasks .* world_size=1.*trainer=slurm, or Trainer\(devices=2, num_nodes=1"):
        check_tasks(1, step_of(2))


def test_a_step_that_lightning_ignores_is_refused():
    with pytest.raises(ValueError, match=r"named 'interactive', for which Lightning ignores.*srun --job-name=train"):
        check_tasks(1, step_of(2, SLURM_JOB_NAME="interactive"))


def test_several_tasks_without_srun_are_refused_before_they_wait():
    environ = step_of(2)
    del environ["SLURM_STEP_ID"]
    with pytest.raises(ValueError, match=r"NTASKS=2, but this process was not started by srun.*put srun before"):
        check_tasks(2, environ)


# -- trainer=slurm -------------------------------------------------------------------------------------------------


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch):
    """`python train.py trainer=slurm` under the given SLURM variables and no others."""

    def compose_under(**variables: str) -> DictConfig:
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            return compose("train", overrides=["trainer=slurm", "task_name=train"], return_hydra_config=True)

    return compose_under


def run_folder(cfg: DictConfig) -> str:
    return str(Path(cfg.hydra.run.dir))


def test_devices_and_nodes_are_what_sbatch_asked_for(composed):
    trainer = composed(**STEP, SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2").trainer
    assert (trainer.devices, trainer.num_nodes, trainer.accelerator) == (4, 2, "auto")
    assert trainer._target_.endswith("Trainer"), "the default trainer lies below"


def test_two_tasks_train_as_ddp(composed, monkeypatch: pytest.MonkeyPatch):
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    cfg = composed(**step_of(2, SLURM_LOCALID="0", SLURM_NODEID="0"))
    chosen = {name: cfg.trainer[name] for name in ("devices", "num_nodes", "strategy")}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, **chosen)
    assert isinstance(trainer.strategy, DDPStrategy)
    check_tasks(trainer.world_size, os.environ)


def test_the_job_id_names_the_run_folder_after_a_requeue_too(composed):
    first = run_folder(composed(**STEP))
    assert first == run_folder(composed(**{**STEP, "SLURM_PROCID": "1", "SLURM_RESTART_COUNT": "1"}))
    assert first.endswith("slurm/77")


def test_an_array_task_has_its_own_folder(composed):
    array = {**STEP, "SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77"}
    folders = {run_folder(composed(**array, SLURM_ARRAY_TASK_ID=task)).rpartition("slurm/")[2] for task in "03"}
    assert folders == {"77/0", "77/3"}


@pytest.mark.parametrize("name", ["interactive", "bash", None])
def test_an_interactive_allocation_names_folders_by_the_clock(composed, name: str | None):
    cfg = composed(SLURM_JOB_ID="77", **({"SLURM_JOB_NAME": name} if name else {}))
    assert re.search(r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}$", run_folder(cfg))
    assert "77" not in Path(run_folder(cfg)).parts


def test_any_job_name_will_do(composed):
    assert run_folder(composed(**{**STEP, "SLURM_JOB_NAME": 'a.b[c]: x,"${y}'})).endswith("slurm/77")


# -- the batch scripts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*slurm/*.s*")), ids=lambda path: path.name)
def test_scripts_parse(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("name", ["train.sbatch", "array.sbatch"])
def test_batch_scripts_ask_for_the_signal_and_the_requeue(name: str):
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", (SCRIPTS / "slurm" / name).read_text(), re.MULTILINE))
    assert directives["signal"] == "SIGUSR1@120", "no B: prefix, the signal is for the tasks"
    assert directives["open-mode"] == "append"
    assert "requeue" in directives
    assert "ntasks-per-node" in directives
    assert "ntasks" not in directives, "Lightning refuses --ntasks"
    assert directives["job-name"] not in ("bash", "interactive")
    assert directives["output"].startswith("logs/slurm/")


def launched(tmp_path: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script with an srun that prints its arguments, one a line."""
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS"\n')
    srun.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["bash", f"scripts/slurm/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_train_sbatch_hands_its_arguments_to_train_py(tmp_path: Path):
    given = ["+compress=[gptq_w4,w8a8]", "task_name=a b"]
    done = launched(tmp_path, "train.sbatch", *given, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3")
    assert done.returncode == 0, done.stderr
    options = ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    program = ["python", "train.py", "trainer=slurm"]
    assert done.stdout.splitlines()[1:] == [*options, *program, *given, "OMP_NUM_THREADS=3"]


def test_train_sbatch_outside_a_job_says_how_to_submit(tmp_path: Path):
    done = launched(tmp_path, "train.sbatch", "seed=1")
    assert done.returncode == 2
    assert "mkdir -p logs/slurm && sbatch scripts/slurm/train.sbatch seed=1" in done.stderr


def test_array_sbatch_gives_each_task_its_argument(tmp_path: Path):
    arguments = ("+compress=gptq_w4", "+compress=w8a8 seed=1", "--", "task_name=compare")
    tail = []
    for task in "01":
        done = launched(tmp_path, "array.sbatch", *arguments, SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 0, done.stderr
        tail.append(done.stdout.splitlines()[6:-1])
    assert tail == [["+compress=gptq_w4", "task_name=compare"], ["+compress=w8a8", "seed=1", "task_name=compare"]]


def test_array_sbatch_names_a_task_without_argument(tmp_path: Path):
    done = launched(tmp_path, "array.sbatch", "seed=1", "seed=2", SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 2
    assert "array task 2 has no argument" in done.stderr
    assert "--array=0-1" in done.stderr
