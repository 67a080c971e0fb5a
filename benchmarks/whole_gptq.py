"""GPTQ W4 g128 of a whole Llama-3-8B-shaped model: 128 rows of 2048 tokens, random weights, seconds by stage.

The package's own walk and GPTQModifier, all on the GPU; the output layer is left out, as it is not quantized. Stages
are separated by marks on the GPU's time line (CUDA events, without synchronization): time between two marks belongs to
the first. So the stages add up to the total, and ``forward passes`` is all time that is in no other stage.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import llama, machine
from benchmarks.checking import first_line
from benchmarks.wheels import missing

__all__ = ["LLAMA", "STAGES", "TINY", "Found", "Job", "StageClock", "run", "table"]

FORWARD = "forward passes"
OF_MODIFIER = {  # by the method of GPTQModifier that a stage is
    "observe": "Hessians",
    "prepare": "factorization",
    "solve_together": "column loop",
    "write": "writing back",
}
OF_SOLVER = {"_proposals": "scales"}  # inside of the column loop's method
STAGES = (FORWARD, "Hessians", "factorization", "scales", "column loop", "writing back")
NEEDED = ("pydantic", "loguru", "compressed_tensors", "transformers")  # compressed_tensors imports the others


@dataclass(frozen=True)
class Job:
    """What is compressed.

    Args:
        shape: Of the model.
        rows: Calibration rows.
        length: Tokens of a row.
        batch: Rows of a batch.
        group: Columns that share a scale.
        dtype: Of the weights.
    """

    shape: llama.Shape
    rows: int
    length: int
    batch: int
    group: int
    dtype: torch.dtype


LLAMA = Job(llama.LLAMA_3_8B, 128, 2048, 8, 128, torch.bfloat16)  # batches of 16384 tokens
TINY = Job(llama.TINY, 6, 16, 2, 32, torch.float32)


@dataclass
class Found:
    """What was measured.

    Args:
        whole: Seconds of ``compress``, by the wall clock; None: it did not come to its end.
        blocks: Finished blocks, and all.
        extrapolated: Seconds that all blocks would have taken at the pace of the finished ones; None: it came to its
            end, or not one block did.
        stages: Seconds, on the GPU's time line.
        forward_alone: Seconds of one forward pass over all tokens, nothing else.
        modules: That were quantized.
        peak_gib: Of GPU memory.
        skipped: It could not begin.
        note: Why something is missing.
    """

    whole: float | None = None
    blocks: tuple[int, int] = (0, 0)
    extrapolated: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    forward_alone: float | None = None
    modules: int = 0
    peak_gib: float | None = None
    skipped: bool = False
    note: str = ""


class OutOfTimeError(Exception):
    """The deadline came first."""


class StageClock:
    """Which stage runs when.

    Args:
        device: Where; on CUDA the marks are events.
        base: The stage outside of all others.
    """

    def __init__(self, device: torch.device, base: str):
        self.device, self.open = device, [base]
        self.marks: list[tuple[str, Any]] = []
        self._mark(base)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this stage; nests."""
        self.open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self.open.pop()
            self._mark(self.open[-1])

    def seconds(self) -> dict[str, float]:
        """By stage, from the first mark until now."""
        self._mark("end")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (name, start), (_, stop) in zip(self.marks, self.marks[1:], strict=False):
            spent = start.elapsed_time(stop) * 1e-3 if self.device.type == "cuda" else stop - start
            found[name] = found.get(name, 0.0) + spent
        return found

    def _mark(self, name: str) -> None:
        if self.device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))


def run(job: Job, device: torch.device, end: float | None = None) -> Found:
    """Compress the model, and report the time of each stage.

    Args:
        job: The model and the data.
        device: Where all of it lies.
        end: ``time.monotonic()`` by which it gives up; None: never.
    """
    if lacking := missing(*NEEDED):
        return Found(skipped=True, note=f"not run: {', '.join(lacking)} missing; put the wheels into BENCH_WHEELS")
    found = Found()
    random = torch.Generator(device).manual_seed(0)
    ids = torch.randint(job.shape.vocabulary, (job.rows, job.length), generator=random, device=device)
    batches = ids.split(job.batch)
    try:
        warm_up(job, batches[:1], device)
        model = llama.random_llama(llama.Body, job.shape, device, job.dtype)
        found.forward_alone = forward_alone(model, batches, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        measure(model, job, batches, device, end, found)
    except OutOfTimeError as error:
        found.note = f"given up: {error}"
    except Exception as error:
        found.note = f"not run: {first_line(error)}"
    if device.type == "cuda":
        found.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def warm_up(job: Job, batches: Sequence[Tensor], device: torch.device) -> None:
    """One block of the same sizes, one batch: kernels are compiled and libraries loaded."""
    model = llama.random_llama(llama.Body, replace(job.shape, layers=1), device, job.dtype)
    measure(model, job, batches, device, None, Found())


def forward_alone(model: nn.Module, batches: Sequence[Tensor], device: torch.device) -> float:
    clock = StageClock(device, FORWARD)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return clock.seconds()[FORWARD]


def measure(
    model: nn.Module, job: Job, batches: Sequence[Tensor], device: torch.device, end: float | None, found: Found
) -> None:
    """Compress in place; what is found is written into ``found`` as far as it came."""
    from lightning_compress import compress

    def progress(text: str, done: int, total: int) -> None:
        if done > found.blocks[0]:  # a log that ends here says how far it came
            print(f"whole_gptq: {done} of {total} blocks, {time.perf_counter() - begun:.1f} s", flush=True)
        found.blocks = done, total
        if end is not None and time.monotonic() > end:
            raise OutOfTimeError(f"no time was left after {done} of {total} blocks ({text})")

    begun, finished = time.perf_counter(), False
    clock = StageClock(device, FORWARD)
    try:
        with ExitStack() as stack:
            modifier = timed_modifier(clock, job.group, stack)
            ledger = compress(model, modifier, batches, blocks="Block", offload_device=None, progress=progress)
        found.modules = len(ledger.rows)
        finished = True
    finally:
        found.stages = clock.seconds()
        seconds, (done, total) = time.perf_counter() - begun, found.blocks
        if finished:
            found.whole = seconds
        elif done:
            found.extrapolated = seconds * total / done


def timed_modifier(clock: StageClock, group: int, stack: ExitStack) -> Any:
    """The package's GPTQModifier, its steps marked on the clock; and its solver's, until the stack is left."""
    from lightning_compress import GPTQModifier
    from lightning_compress.modifiers.gptq.solver import Solver

    def marked(function: Callable[..., Any], stage: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.stage(stage):
                return function(*args, **kwargs)

        return call

    methods = {method: marked(getattr(GPTQModifier, method), stage) for method, stage in OF_MODIFIER.items()}
    for method, stage in OF_SOLVER.items():
        stack.enter_context(mock.patch.object(Solver, method, marked(getattr(Solver, method), stage)))
    timed: Any = type("TimedGPTQModifier", (GPTQModifier,), {"__module__": __name__, **methods})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return timed(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})


def table(found: Found) -> list[str]:
    """Markdown."""

    def shown(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.2f}"

    lines = [
        f"GPTQ W4 g{LLAMA.group} of a Llama-3-8B-shaped model, random weights, {LLAMA.rows} x {LLAMA.length} tokens, "
        "the walk on the GPU. Stages add up to the whole; forward passes hold all that is in no other stage.",
        "",
    ]
    rows = [[name, shown(found.stages.get(name))] for name in STAGES]
    rows += [["whole", shown(found.whole)]]
    if found.extrapolated is not None:
        done, total = found.blocks
        rows += [[f"all {total} blocks at the pace of the first {done}", shown(found.extrapolated)]]
    rows += [["one forward pass alone", shown(found.forward_alone)]]
    lines += machine.table(["stage", "seconds"], rows)
    said = [f"{found.modules} modules quantized"] if found.modules else []
    said += [] if found.peak_gib is None else [f"peak memory {found.peak_gib:.1f} GiB"]
    return [*lines, "", *(["; ".join([*said, *([found.note] if found.note else [])])] if said or found.note else [])]
