"""One compression in a process of its own, measured: CPU seconds of the compression alone, and peak memory.

    python benchmarks/measured_run.py '{"library": "peer", "task": "smollm2", ...}'     # the fields of Job

The peer's python runs it for llm-compressor (`library: peer`), ours for this package (`library: ours`). Outside of the
clock: imports, loading, tokenizing, saving. Nothing is evaluated here. The last line printed is `RESULT {json}`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import minilm
import smollm2
import techniques
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """What to compress, and how.

    Args:
        library: ``ours``, ``peer``, or ``forward`` (one forward pass over the calibration tokens, for comparison).
        task: ``smollm2`` or ``minilm``.
        model: Folder of the dense checkpoint.
        texts: Folder of the texts.
        out: Folder for the compressed checkpoint; empty: none is written.
        rows: Calibration rows.
        length: Tokens of a row.
        batch: Rows of a batch.
        scheme: A preset that both libraries know, such as ``NVFP4A16``; empty: integers of ``bits`` in groups.
        bits: Bits of a weight.
        group: Columns that share a scale.
        groups: Those that an allocation may choose.
        subset: Which calibration subset.
        walk: Ours only: ``two_pass``, ``one_pass`` or ``auto``.
        scale_search: Ours only, of GPTQ and AutoRound: ``minmax``, ``mse`` or ``hessian``.
        technique: A name of techniques.py.
        symmetric: Codes around zero; else with zero points.
        sparsity: Share of zeros, of pruners.
        mask: Their structure: ``unstructured`` or ``2:4``.
        owl: Ours only: OWL's allocation of sparsity.
        iters: Of AutoRound, from GPTQ's solution.
        epochs: Of TuneModifier.
        lr: Of TuneModifier.
    """

    library: Literal["ours", "peer", "forward"]
    task: Literal["smollm2", "minilm"]
    model: str
    texts: str
    out: str = ""
    rows: int = 16
    length: int = 256
    batch: int = 4
    scheme: str = ""
    bits: int = 4
    group: int = 64
    groups: tuple[int, ...] = (32, 64, 192)
    subset: int = 0
    walk: str = "two_pass"
    scale_search: str = "hessian"
    technique: str = "gptq"
    symmetric: bool = True
    sparsity: float = 0.5
    mask: str = "unstructured"
    owl: bool = False
    iters: int = 100
    epochs: int = 8
    lr: float = 1e-3

    @property
    def ignore(self) -> list[str]:
        """Modules that stay dense: the output layer, and the encoder's pooler, which no embedding passes."""
        return ["lm_head"] if self.task == "smollm2" else ["re:.*pooler.*"]

    @property
    def grid(self) -> dict[str, Any]:
        """Scheme and ignored modules, in the words that both libraries share."""
        if self.scheme:
            return {"scheme": self.scheme, "ignore": self.ignore}
        groups = {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, **groups}
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": self.ignore}


def in_own_process(job: Job, peer_python: str) -> dict[str, Any]:
    """Call this file for one job: in the environment of its library, one thread, without the hub.

    Args:
        job: What to do.
        peer_python: The python that has llm-compressor.

    Returns:
        What :func:`run` found. SystemExit with the output when it failed.
    """
    if job.out:
        shutil.rmtree(job.out, ignore_errors=True)
    return result_of([python_of(job, peer_python), __file__, json.dumps(asdict(job))], str(job))


def python_of(job: Job, peer_python: str) -> str:
    """The interpreter of the library; SystemExit when there is none."""
    python = peer_python if job.library == "peer" else sys.executable
    if not shutil.which(python):
        raise SystemExit(f"{python} is missing: `make bench-peer-env` makes the peer's environment")
    return python


def result_of(command: list[str], what: str) -> dict[str, Any]:
    """The object behind `RESULT` in what a command prints: one thread, no hub; SystemExit if it fails."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise SystemExit(f"{what} failed with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(results[-1].removeprefix("RESULT ")))


def run(job: Job) -> dict[str, Any]:
    """Load, compress inside the clock, save; the facts for the report."""
    torch.manual_seed(job.subset)  # random rotations: other ones with each subset
    torch.set_num_threads(1)
    tokenizer = smollm2.load_tokenizer(Path(job.model))
    task = smollm2 if job.task == "smollm2" else minilm
    model = task.load(Path(job.model))
    if job.task == "smollm2":
        rows = smollm2.calibration_rows(tokenizer, Path(job.texts), job.rows, job.length, job.subset)
    else:
        rows = minilm.calibration_rows(tokenizer, Path(job.texts), job.rows, job.length)
    prepare = {"ours": prepare_ours, "peer": prepare_peer, "forward": prepare_forward}[job.library]
    compress, save = prepare(job, model, tokenizer, rows)
    with measured() as facts:
        ledger = compress()
    facts["bits"] = stored_bits(ledger) if job.library == "ours" else None
    facts["versions"] = versions()
    if job.out and job.library != "forward":
        began = time.process_time()
        save(Path(job.out))
        facts["save_cpu_s"] = time.process_time() - began
    return {"job": asdict(job), **facts}


def stored_bits(ledger: Any) -> float | None:
    """Bits per weight of the quantized modules, scales included; None where nothing is quantized."""
    rows = [row for row in ledger if row.bits is not None and row.params]
    weights = sum(row.params for row in rows)
    return sum(row.bits * row.params for row in rows) / weights if weights else None


def prepare_ours(
    job: Job, model: nn.Module, tokenizer: Any, rows: Tensor
) -> tuple[Callable[[], Any], Callable[[Path], Any]]:
    """The call that is measured, and the one that writes the folder."""
    from lightning_compress import compress, save

    modifiers = techniques.ours(job)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in rows.split(job.batch)]
    return (
        lambda: compress(model, modifiers, batches, walk=job.walk),
        lambda out: save(model, out, tokenizer=tokenizer, overwrite=True),
    )


def prepare_peer(
    job: Job, model: nn.Module, tokenizer: Any, rows: Tensor
) -> tuple[Callable[[], Any], Callable[[Path], Any]]:
    """The same for llm-compressor. Its default order of columns is the static one, too."""
    from datasets import Dataset
    from llmcompressor import oneshot

    ids = rows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    recipe = techniques.of_peer(job)
    needs_data = not job.technique.endswith("rtn")
    calibration = {
        "dataset": data,
        "num_calibration_samples": job.rows,
        "max_seq_length": job.length,
        "batch_size": job.batch,
        "shuffle_calibration_samples": False,
    }

    def compress() -> None:
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **(calibration if needs_data else {}))

    def save(out: Path) -> None:
        model.save_pretrained(out, save_compressed=True)
        tokenizer.save_pretrained(out)

    return compress, save


def prepare_forward(
    job: Job, model: nn.Module, tokenizer: Any, rows: Tensor
) -> tuple[Callable[[], Any], Callable[[Path], Any]]:
    """One forward pass over the calibration tokens through the body of the model (no output layer)."""
    body = model.model if job.task == "smollm2" else model

    @torch.no_grad()
    def forward() -> None:
        for x in rows.split(job.batch):
            body(input_ids=x, attention_mask=torch.ones_like(x))

    return forward, lambda out: None


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """CPU and wall seconds of the block; resident memory (MiB) before it, at its peak, and at that of the process."""
    before = resident("VmHWM")  # not ru_maxrss: a child process inherits its parent's
    facts: dict[str, Any] = {"rss_before_mib": resident("VmRSS")}
    reset = reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    yield facts
    facts["cpu_s"] = time.process_time() - cpu
    facts["wall_s"] = time.perf_counter() - wall
    facts["rss_peak_inside_mib"] = resident("VmHWM") if reset else None
    facts["rss_peak_mib"] = max(before, resident("VmHWM"))
    facts["load_1min"] = os.getloadavg()[0]


def reset_peak() -> bool:
    """Set the kernel's high-water mark of this process back to what it holds now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> float:
    """A line of /proc/self/status in MiB (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def versions() -> dict[str, str]:
    """Versions of what takes part, by package."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for package in ("torch", "transformers", "compressed-tensors", "llmcompressor"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(Job(**json.loads(sys.argv[1])))))
