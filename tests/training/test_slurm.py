"""SLURM: what lightning_compress/training/slurm.py checks, `trainer=slurm`, the batch scripts, and (marker slurm) jobs.

The jobs need a cluster that answers `sinfo`; scripts/local_slurm/up.sh starts one here (make test-slurm-local).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_compress.training.slurm import check_tasks

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("value", ["2(x3)", "", "two"])
@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_a_number_that_is_not_one_is_named(name: str, value: str):
    environ = step_of(2, SLURM_JOB_NAME="interactive") | {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not a number of tasks")):
        check_tasks(2, environ)


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
    given = ["-m", "+compress=gptq_w4,[gptq_w4,w8a8]", "task_name=a b"]
    done = launched(tmp_path, "train.sbatch", *given, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3")
    assert done.returncode == 0, done.stderr
    options = ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    program = ["python", "train.py", *given, "trainer=slurm"]  # the last: after it Hydra would not take -m
    assert done.stdout.splitlines()[1:] == [*options, *program, "OMP_NUM_THREADS=3"]


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
        tail.append(done.stdout.splitlines()[5:-2])
    assert tail == [["+compress=gptq_w4", "task_name=compare"], ["+compress=w8a8", "seed=1", "task_name=compare"]]


def test_array_sbatch_names_a_task_without_argument(tmp_path: Path):
    done = launched(tmp_path, "array.sbatch", "seed=1", "seed=2", SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 2
    assert "array task 2 has no argument" in done.stderr
    assert "--array=0-1" in done.stderr


# -- jobs on a cluster -------------------------------------------------------------------------------------------------

DEMO = [
    "+compress=gptq_w4", "model.hidden_size=128", "model.intermediate_size=128", "model.num_heads=2",
    "data.block_length=32", "data.batch_size=4", "data.val_blocks=16", "data.test_blocks=16",
    "data.calibration_blocks=8", "+trainer.limit_train_batches=8", "trainer.max_epochs=2",
    "+callbacks.compress.calibration_batches=2", "callbacks.progress_bar.refresh_rate=1000",
]  # fmt: skip

SLOW = '''
"""Take their time, so that a signal finds every rank in the same place."""

import time

from lightning import Callback

from lightning_compress import Modifier
from lightning_compress.core import Needs


class SlowStep(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5:
            print("a slow step", flush=True)
            for _ in range(50):
                time.sleep(0.1)


class SlowModifier(Modifier):
    needs = Needs(calibration=True)

    def on_initialize(self, state, **kwargs):
        return True

    def on_block_end(self, state, event, **kwargs):
        print(f"slow over {state.block_name!r}", flush=True)
        for _ in range(30):
            time.sleep(0.1)
'''


class Cluster:
    """Submits from a folder that holds the app, so that runs leave nothing in the repository."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("train.py", "conf", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "slow.py").write_text(SLOW)
        (folder / "logs" / "slurm").mkdir(parents=True)

    def submit(self, *arguments: str, script: str = "train.sbatch", options: tuple[str, ...] = ("--nodes=2",)) -> str:
        resources = ["--ntasks-per-node=1", "--cpus-per-task=1", "--time=00:10:00", "--signal=SIGUSR1@60"]
        command = ["sbatch", "--parsable", *resources, *options, f"scripts/slurm/{script}", *arguments]
        environ = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": f"{self.folder}:{ROOT}"}
        done = subprocess.run(command, cwd=self.folder, env=environ, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def log(self, job: str) -> str:
        path = self.folder / "logs" / "slurm" / f"compress-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def states(self, job: str) -> set[str]:
        return set(re.findall(r"JobState=(\w+)", self.scontrol("show", "job", job)))

    def scontrol(self, *arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    def until(self, met: Callable[[], object], what: str, job: str, seconds: float = 240) -> None:
        for _ in range(int(seconds * 4)):
            if met():
                return
            assert not self.states(job) & {"FAILED", "TIMEOUT"} or what == "the end", self.log(job)[-4000:]
            time.sleep(0.25)
        subprocess.run(["scancel", job], check=False)
        raise AssertionError(f"waited {seconds} s for {what} of job {job}:\n{self.log(job)[-4000:]}")

    def finish(self, job: str) -> None:
        over = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
        self.until(lambda: self.states(job) <= over, "the end", job)
        assert self.states(job) == {"COMPLETED"}, self.log(job)[-4000:]

    def requeue(self, job: str, when: str) -> None:
        """Send the signal of the time limit as soon as ``when`` stands in the log, and do without the 120 s pause."""
        self.until(lambda: when in self.log(job), repr(when), job)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        self.until(lambda: self.states(job) == {"PENDING"}, "the requeue", job, seconds=60)
        time.sleep(2)  # a credential issued in the second of the requeue is taken for a revoked one
        self.scontrol("update", f"jobid={job}", "StartTime=now")
        self.finish(job)
        assert "Restarts=1" in self.scontrol("show", "job", job)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("no Slurm answers sinfo; make test-slurm-local starts one on this machine")
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("the batch script activates a virtual environment, and this Python runs in none")
    return Cluster(tmp_path)


def run_of(cluster: Cluster, job: str) -> Path:
    return cluster.folder / "logs" / "train" / "slurm" / job


def assert_exported_once(cluster: Cluster, job: str) -> None:
    run, log = run_of(cluster, job), cluster.log(job)
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= {path.name for path in (run / "compressed").iterdir()}
    assert (run / "report" / "summary.json").exists()
    assert log.count(f"compressed model: {run}/compressed") == 1
    assert f"Loaded model weights from the checkpoint at {run}/compressed.ckpt" in log
    assert [path.name for path in (cluster.folder / "logs" / "train").rglob("compressed")] == ["compressed"]


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_two_nodes_train_and_rank_0_compresses(cluster: Cluster):
    job = cluster.submit(*DEMO)
    cluster.finish(job)
    assert "Starting with 2 processes" in cluster.log(job)
    assert_exported_once(cluster, job)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_requeued_in_training_goes_on_in_its_folder_and_exports_once(cluster: Cluster):
    job = cluster.submit(*DEMO, "+callbacks.slow._target_=slow.SlowStep")
    cluster.requeue(job, "a slow step")
    log, run = cluster.log(job), run_of(cluster, job)
    assert "a slow step" not in log.partition("restart 1")[2], "it went on after the step in which it was signalled"
    assert "SIGUSR1: this run ends here; " in log
    assert f"Restored all states from the checkpoint at {run}/hpc_ckpt_1.ckpt" in log
    assert_exported_once(cluster, job)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_sigterm_saves_and_ends_the_job(cluster: Cluster):
    job = cluster.submit(*DEMO, "+callbacks.slow._target_=slow.SlowStep")
    cluster.until(lambda: "a slow step" in cluster.log(job), "the slow step", job)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    cluster.until(lambda: cluster.states(job) == {"FAILED"}, "the end", job, seconds=60)
    assert "ExitCode=143:0" in cluster.scontrol("show", "job", job)
    assert (run_of(cluster, job) / "hpc_ckpt_1.ckpt").exists()
    assert not (run_of(cluster, job) / "compressed").exists()


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_requeued_while_it_compresses_compresses_again(cluster: Cluster):
    job = cluster.submit(*DEMO, "+callbacks.compress.modifiers.slow._target_=slow.SlowModifier")
    cluster.requeue(job, "slow over")
    log, run = cluster.log(job), run_of(cluster, job)
    assert f"Restored all states from the checkpoint at {run}/hpc_ckpt_1.ckpt" in log
    assert "`Trainer.fit` stopped" in log.partition("restart 1")[2], "it trained no further"
    assert_exported_once(cluster, job)
    assert (run / "hpc_ckpt_1.ckpt").samefile(run / "compressed.ckpt")


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_signal_before_training_requeues_the_job(cluster: Cluster):
    job = cluster.submit(*DEMO)
    cluster.requeue(job, "] data: ")
    assert_exported_once(cluster, job)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_the_tasks_of_an_array_have_folders_of_their_own(cluster: Cluster):
    demo = [setting for setting in DEMO if not setting.startswith("+compress")]
    options = ("--nodes=1", "--array=0-1")
    job = cluster.submit("+compress=gptq_w4", "+compress=gptq_w8", "--", *demo, script="array.sbatch", options=options)
    cluster.finish(job)
    for task in ("0", "1"):
        assert (run_of(cluster, job) / task / "compressed" / "config.json").exists()


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_two_tasks_of_one_device_each_are_refused(cluster: Cluster):
    job = cluster.submit(*DEMO, "trainer.devices=1", options=("--nodes=1", "--ntasks-per-node=2"))
    cluster.until(lambda: cluster.states(job) == {"FAILED"}, "the end", job)
    assert "ValueError: SLURM started 2 tasks (SLURM_NTASKS), but the Trainer has world_size=1" in cluster.log(job)
