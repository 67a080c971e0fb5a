"""Preempt a job of two ranks at random moments, and compare what it leaves behind with an undisturbed job's.

    make chaos-slurm                                                     # on a two-node cluster of this machine
    python -m scripts.chaos_slurm --training 20 --calibration 10         # on the cluster that SLURM_CONF names

The job is `train.py +compress=gptq_w4` on 2 ranks: 3 epochs of 40 steps, whose training loader has a state, validation,
calibration, export, test. Each is signalled as at a time limit (SIGUSR1 to all tasks), at a moment drawn uniformly from
training (validation included), or from calibration, and requeued; it has to end by itself with the same export, byte
for byte. A run of this script goes on where the last one in the same folder stopped; results go to benchmarks/results.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
OVER = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
SECONDS_TO_LEAVE = 60  # later it counts as hung

JOB = [
    "+compress=gptq_w4", "model.hidden_size=128", "model.intermediate_size=128", "model.num_heads=2",
    "model.num_layers=4", "data.block_length=32", "data.batch_size=4", "data.train_blocks=320", "data.val_blocks=64",
    "data.test_blocks=16", "data.calibration_blocks=16", "trainer.max_epochs=3",
    "+callbacks.compress.calibration_batches=4", "callbacks.progress_bar.refresh_rate=1000",
    "+callbacks.compress.verify=false", "+callbacks.marks._target_=chaos_marks.Marks",
    "+callbacks.compress.modifiers.slow._target_=chaos_marks.Slow",
]  # fmt: skip

MARKS = '''
"""Say how far the job is, and take some time for it."""

import time

from lightning import Callback

from lightning_compress import Modifier
from lightning_compress.core import Needs


def mark(text):
    print(f"MARK {text} {time.time():.2f}", flush=True)


class Marks(Callback):
    def on_train_start(self, trainer, *args):
        if trainer.is_global_zero:
            mark(f"training from step {trainer.global_step} at")

    def on_train_batch_end(self, trainer, *args):
        time.sleep(0.05)
        if trainer.is_global_zero:
            mark(f"step {trainer.global_step} at")


class Slow(Modifier):
    needs = Needs(calibration=True, one_pass=True, team="weights")

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        mark("calibration at")

    def on_module_ready(self, state, event, **kwargs):
        time.sleep(0.2)

    def on_block_end(self, state, event, **kwargs):
        if state.team.rank == 0:
            mark(f"block {state.block_name} at")

    def group_state(self, modules):
        return {}

    def on_calibration_end(self, state, event, **kwargs):
        mark("calibrated at")
'''


class Job:
    """One job; its log tells how far it is."""

    def __init__(self, folder: Path):
        self.folder = folder
        resources = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=00:30:00", "--signal=SIGUSR1@60"]
        environ = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": f"{folder}:{ROOT}"}
        command = ["sbatch", "--parsable", *resources, "scripts/slurm/train.sbatch", *JOB]
        answer = subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
        self.number = answer.stdout.strip()

    def log(self) -> str:
        path = self.folder / "logs" / "slurm" / f"compress-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def marks(self, text: str) -> list[float]:
        """When it said so; all attempts."""
        return [float(seconds) for seconds in re.findall(rf"MARK {text} ([\d.]+)", self.log())]

    def states(self) -> set[str]:
        answer = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True, check=False)
        return set(re.findall(r"JobState=(\w+)", answer.stdout))

    def is_over(self) -> bool:
        return bool(self.states()) and self.states() <= OVER

    def export(self) -> str | None:
        """A hash of all exported files but the manifest, which names the run."""
        folder = self.folder / "logs" / "train" / "slurm" / self.number / "compressed"
        files = sorted(path for path in folder.glob("*") if path.name != "export_manifest.json")
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16] if files else None

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], check=False)
        until(self.is_over, 60)


def until(met: Callable[[], object], seconds: float) -> bool:
    """Whether ``met`` came true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if met():
            return True
        time.sleep(0.1)
    return False


def undisturbed(folder: Path) -> dict[str, Any]:
    """The export of a job that nobody signals, and how long its phases are."""
    job = Job(folder)
    if not until(job.is_over, 600) or job.states() != {"COMPLETED"}:
        raise SystemExit(f"the undisturbed job {job.number} ended as {job.states()}:\n{job.log()[-3000:]}")
    begun, calibrating = job.marks(r"training from step 0 at")[0], job.marks("calibration at")[0]
    return {
        "export": job.export(),
        "training_s": round(job.marks(r"step \d+ at")[-1] - begun, 2),
        "calibration_s": round(job.marks("calibrated at")[-1] - calibrating, 2),
    }


def preempted(folder: Path, reference: dict[str, Any], phase: str, share: float) -> dict[str, Any]:
    """Signal a job at a share of a phase, requeue it, and let it end."""
    job, mark = Job(folder), {"training": r"training from step 0 at", "calibration": "calibration at"}[phase]
    result: dict[str, Any] = {"phase": phase, "share": round(share, 3), "job": job.number}
    if not until(lambda: job.marks(mark) or job.is_over(), 240) or not job.marks(mark):
        job.cancel()
        return result | {"end": "did not begin", "log": job.log()[-1500:]}
    time.sleep(max(0.0, job.marks(mark)[0] + share * reference[f"{phase}_s"] - time.time()))
    steps = re.findall(r"MARK step (\d+)", job.log())
    result["step"] = int(steps[-1]) if steps else 0
    signalled = time.monotonic()
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    if not until(lambda: job.states() == {"PENDING"} or job.is_over(), SECONDS_TO_LEAVE):
        job.cancel()
        return result | {"end": "hung", "log": job.log()[-1500:]}
    result["seconds_to_leave"] = round(time.monotonic() - signalled, 1)
    if not job.is_over():
        time.sleep(2)  # a credential issued in the second of the requeue is taken for a revoked one
        subprocess.run(["scontrol", "update", f"jobid={job.number}", "StartTime=now"], check=False)
    ended = until(job.is_over, 300)
    first, _, again = job.log().partition("restart 1")
    resumed = re.findall(r"MARK training from step (\d+)", again)
    blocks = [set(re.findall(r"MARK block (\S+) at", attempt)) for attempt in (first, again)]
    result |= {
        "end": next(iter(job.states())) if ended else "hung after the requeue",
        "resumed_at": int(resumed[0]) if resumed else None,
        "blocks": [len(names) for names in blocks],
        "blocks_twice": len(blocks[0] & blocks[1]),
        "same": job.export() == reference["export"],
    }
    if result["end"] != "COMPLETED" or not result["same"]:
        result["log"] = job.log()[-3000:]
    if not ended:
        job.cancel()
    return result


def report(reference: dict[str, Any], results: list[dict[str, Any]], command: str) -> Path:
    """Write the table of all results."""
    rows = []
    for phase in ("training", "calibration"):
        those = [result for result in results if result["phase"] == phase]
        leaving = [result["seconds_to_leave"] for result in those if "seconds_to_leave" in result]
        count = [
            len(those),
            sum("hung" in result["end"] for result in those),
            sum(result["end"] != "COMPLETED" for result in those),
            sum(result["end"] == "COMPLETED" and not result["same"] for result in those),
            max((result.get("blocks_twice", 0) for result in those), default=0),
        ]
        rows.append([phase, *count, f"{sorted(leaving)[len(leaving) // 2]} / {max(leaving)}" if leaving else ""])
    head = [
        "phase",
        "preemptions",
        "hung",
        "not completed",
        "another export",
        "blocks done twice, at most",
        "seconds from signal to requeue, median / most",
    ]
    lines = [
        f"`{command}`",
        "",
        f"Undisturbed, training takes {reference['training_s']} s, calibration {reference['calibration_s']} s.",
        "",
    ]
    return machine.write(
        "preemption",
        "Preemptions of a job of two ranks on a Slurm of this machine",
        [*lines, *machine.table(head, rows)],
        {"command": command, "undisturbed": reference, "preemptions": results},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=int, default=20, help="preemptions in training")
    parser.add_argument("--calibration", type=int, default=10, help="preemptions in calibration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("logs/chaos_slurm"))
    parser.add_argument("--most", type=int, default=1000, help="preemptions of this run of the script")
    parser.add_argument("--parallel", type=int, default=1, help="jobs at the same time, each on a node of its own")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    (folder / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
    (folder / "chaos_marks.py").write_text(MARKS)
    for name in ("train.py", "conf", "scripts"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    known, record = folder / "undisturbed.json", folder / "preemptions.jsonl"
    if not known.exists():
        known.write_text(json.dumps(undisturbed(folder)))
        print(known.read_text(), flush=True)
    reference = json.loads(known.read_text())
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    draw = random.Random(arguments.seed)
    plan = [("training", draw.random()) for _ in range(arguments.training)]
    plan += [("calibration", draw.random()) for _ in range(arguments.calibration)]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        remaining = plan[len(results) :][: arguments.most]
        for result in pool.map(lambda moment: preempted(folder, reference, *moment), remaining):
            results.append(result)
            print(json.dumps(result), flush=True)
            with record.open("a") as file:
                file.write(json.dumps(result) + "\n")
    command = f"python -m scripts.chaos_slurm --training {arguments.training} --calibration {arguments.calibration}"
    print(report(reference, results, f"{command} --seed {arguments.seed}"))
    return 0 if all(result["end"] == "COMPLETED" and result["same"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
