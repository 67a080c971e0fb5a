"""Every op beside torch's way to the same result, on the CUDA GPU of this machine, in one process.

    make bench-gpu                                  # or: python benchmarks/bench_ops.py --help

First the rates of this GPU are measured (copying, and a bf16 product), for the roofline. Each case is then checked on
fresh random inputs against float64, results poisoned with NaN, and timed: calls over rotated buffers of more than
200 MB in all, so that L2 holds none of them, captured into a CUDA graph and replayed, contestants in turn; a figure is
the median over rounds. What fails its check is not timed. Cells of what was not run, or did not fit into the time or
the memory, stay empty. `--check` does no more than check tiny shapes, on any machine.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.op_case import Call, Case, Trial
from benchmarks.op_cases import cases

ROTATED = 200e6         # bytes that calls go round; L2 of an H200 holds 60 MB
SETS = 32               # at most so many sets of buffers
SECONDS = 1.0           # of rounds of a case, but no fewer than seven rounds


@dataclass
class Outcome:
    """What became of a case: relative errors and microseconds by contestant (``ours`` among them), or why not."""

    op: str
    shape: str
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    note: str = ""


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    try:
        chosen = cases(arguments.ops, tiny=arguments.check)
    except ValueError as error:
        print(f"bench_ops: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{case.op}: {case.shape}" for case in chosen))
        return 0
    if arguments.check:
        outcomes = [checked(case, torch.device("cuda" if torch.cuda.is_available() else "cpu")) for case in chosen]
        for outcome in outcomes:
            errors = {name: f"{error:.1e}" for name, error in outcome.errors.items()}
            print(outcome.op, outcome.shape, errors, outcome.note)
        return int(any(outcome.note for outcome in outcomes))
    if not torch.cuda.is_available():
        print(
            f"bench_ops: no CUDA GPU here (torch {torch.__version__} sees none), so nothing was measured and nothing "
            f"written; run it on a machine with one, or --check the ops on this CPU",
            file=sys.stderr,
        )
        return 1
    return bench(chosen, arguments, torch.device("cuda"))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ops beside torch, on the GPU of this machine")
    parser.add_argument("--ops", nargs="*", default=[], help="only these; default: all")
    parser.add_argument("--seconds", type=float, default=440, help="time for all cases; the rest stays empty")
    parser.add_argument("--rounds", type=int, default=50, help="replays of each graph")
    parser.add_argument("--dry", action="store_true", help="print, write no files")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--check", action="store_true", help="check tiny shapes against float64 and end; any machine")
    return parser.parse_args(words)


def bench(chosen: Sequence[Case], arguments: argparse.Namespace, device: torch.device) -> int:
    end = time.monotonic() + arguments.seconds
    name = torch.cuda.get_device_name(device)
    copied, multiplied = rates(device, arguments.rounds)
    print(f"{name}: copies at {copied / 1e12:.2f} TB/s, multiplies bf16 at {multiplied / 1e12:.0f} TFLOP/s", flush=True)
    outcomes = []
    for case in chosen:
        outcome = checked(case, device) if time.monotonic() < end else Outcome(case.op, case.shape, note="not run")
        outcome.floor = max(case.moved / copied, case.flop / multiplied) * 1e6
        if not outcome.note:
            try:
                outcome.times = times(case, device, outcome.errors, arguments.rounds)
            except RuntimeError as error:
                outcome.note = f"not timed: {first_line(error)}"
            torch.cuda.empty_cache()
            torch.compiler.reset()                               # a function is compiled for a few shapes at most
        print(outcome.op, outcome.shape, {k: f"{t:.1f} us" for k, t in outcome.times.items()}, outcome.note, flush=True)
        outcomes.append(outcome)
    lines = report(outcomes, copied, multiplied)
    if not arguments.dry:
        facts = {
            "gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton_version(),
            "copied_bytes_per_s": copied, "bf16_flop_per_s": multiplied, "cases": [asdict(o) for o in outcomes],
        }  # fmt: skip
        title = f"Ops on one {name}, beside torch"
        print("written:", machine.write("ops", title, lines, facts, gpu_slug(name)))
    return int(any(outcome.note.startswith("wrong") for outcome in outcomes))


def checked(case: Case, device: torch.device) -> Outcome:
    """Relative errors of all contestants that run here; a note when ours is wrong, or the case cannot be made."""
    outcome = Outcome(case.op, case.shape)
    try:
        trial = case.make(device, case.dtype, 12345)
        expected = [t.double() for t in parts(trial, trial.exact())]
        for name, call in calls(trial).items():
            try:
                with poisoned_memory():
                    results = parts(trial, call())
            except RuntimeError as error:
                if name == "ours":
                    raise
                print(f"{case.op} {case.shape}: {name} does not run: {first_line(error)}", flush=True)
                continue
            pairs = zip(results, expected, strict=True)
            outcome.errors[name] = max(((r.double() - e).norm() / e.norm()).item() for r, e in pairs)
    except RuntimeError as error:                                # OutOfMemoryError is one
        outcome.note = f"not run: {first_line(error)}"
        return outcome
    if not outcome.errors["ours"] <= case.tolerance:             # NaN is wrong too
        outcome.note = f"wrong: relative error {outcome.errors['ours']:.1e}, at most {case.tolerance:.0e} was expected"
    return outcome


def parts(trial: Trial, result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [trial.part(t) for t in (result if isinstance(result, tuple) else (result,))]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated and not written is NaN (torch fills it where algorithms must be deterministic)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # one for each op that has no deterministic way
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def times(case: Case, device: torch.device, names: Collection[str], rounds: int) -> dict[str, float]:
    """Microseconds of a call: medians over rounds in which each contestant's graph is replayed once."""
    count = min(SETS, max(1, math.ceil(ROTATED / case.moved)))
    sets = [calls(case.make(device, case.dtype, seed)) for seed in range(count)]
    repeats = max(1, 20 // count) if case.moved < ROTATED else 1
    graphs = {name: captured([one[name] for one in sets] * repeats) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    begun = time.monotonic()
    for number in range(-3, rounds):                             # three rounds warm up
        for name, replay in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            if number >= 0:
                spent[name].append(start.elapsed_time(stop) * 1e3 / (count * repeats))
        if number >= 6 and time.monotonic() - begun > SECONDS:
            break
    return {name: statistics.median(values) for name, values in spent.items()}


def captured(run: Sequence[Call]) -> Callable[[], None]:
    """Replays all the calls as one CUDA graph; kernels are compiled, and libraries chosen, before it is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in dict.fromkeys(run):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in run:
            call()
    return graph.replay


def rates(device: torch.device, rounds: int) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), FLOP per second of a bf16 product of random numbers."""
    size, side = 2**30, 8192

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
        x, y = torch.randn(2, side, side, device=device).to(dtype)
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return Trial(lambda: target.copy_(source), {"product": lambda: x @ y}, lambda: x)

    found = times(Case("rates", "", 2 * size, 2 * side**3, 0, make), device, ("ours", "product"), rounds)
    return 2 * size / found["ours"] * 1e6, 2 * side**3 / found["product"] * 1e6


def report(outcomes: Sequence[Outcome], copied: float, multiplied: float) -> list[str]:
    """Markdown: for each op the headline and a table of its cases; cells of what was not measured are empty."""
    lines = [
        f"Copies at {copied / 1e12:.2f} TB/s, bf16 product at {multiplied / 1e12:.0f} TFLOP/s; both measured here, and "
        "the roofline is made of them. Microseconds of a call, medians of graph replays over rotated buffers; "
        "ratio: theirs / ours, above 1 ours is faster. Empty: not measured.",
        "",
    ]
    for op in dict.fromkeys(outcome.op for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.op == op]
        others = list(dict.fromkeys(name for row in rows for name in row.errors | row.times if name != "ours"))
        head = ["shape", "error", "ours, us", "of the roofline", *(f"{name}, us | ratio" for name in others), "note"]
        lines += [f"## {op}", "", *(line for name in others if (line := headline(rows, name))), ""]
        lines += [*machine.table(" | ".join(head).split(" | "), [cells(row, others) for row in rows]), ""]
    return lines


def headline(rows: Sequence[Outcome], name: str) -> str:
    ratios = [row.times[name] / row.times["ours"] for row in rows if name in row.times and "ours" in row.times]
    if not ratios:
        return ""
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
    return f"- over {name}: geometric mean {mean:.2f}, smallest {min(ratios):.2f}, of {len(ratios)} shapes"


def cells(row: Outcome, others: Sequence[str]) -> list[str]:
    ours = row.times.get("ours")
    found = [
        row.shape,
        f"{row.errors['ours']:.1e}" if "ours" in row.errors else "",
        f"{ours:.1f}" if ours else "",
        f"{row.floor / ours:.0%}" if ours and row.floor else "",
    ]
    for name in others:
        theirs = row.times.get(name)
        found += [f"{theirs:.1f}" if theirs else "", f"{theirs / ours:.2f}" if theirs and ours else ""]
    return [*found, row.note]


def calls(trial: Trial) -> dict[str, Call]:
    return {"ours": trial.ours, **trial.contestants}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")


def gpu_slug(name: str) -> str:
    """``nvidia-h200`` of ``NVIDIA H200``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def triton_version() -> Any:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
