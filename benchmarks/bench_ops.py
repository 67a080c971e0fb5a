"""The kernels on the CUDA GPU of this machine: ops and contestants, GPTQ of a complete model, decoding with it.

    make bench-gpu                                  # or: python benchmarks/bench_ops.py --help

First the rates of this GPU are measured (copying, and a bf16 product), for the roofline. Each case is then checked on
fresh random inputs against float64, output memory filled with NaN, and timed: calls over rotating buffers of more
than 200 MB in all, so that L2 holds none of them, captured into a CUDA graph and replayed alternately with contestants;
a figure is the median over rounds. Cases that fail their check are not timed. Then whole_gptq.py and decode.py run.

Every section has its share of the time; unused time passes to the next. The report names cases that did not fit into
the time or the memory; their cells stay empty. Results are written after every section, so that a crash loses only
later sections; after an error that ends the CUDA context nothing more is tried. gpu_run.sh gives each section a process
of its own, and `--merge FOLDER` makes one report of what they wrote. `--check` only checks tiny shapes, on any machine.
torch and Triton are required; wheels in the folder BENCH_WHEELS are used, too, and missing packages are named.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks import decode, wheels, whole_gptq
from benchmarks.checking import Outcome, checked, first_line
from benchmarks.goals import goals_table
from benchmarks.op_case import Case
from benchmarks.op_cases import cases
from benchmarks.op_results import Results, merged, rates_line, write
from benchmarks.replay import rates, rounds_of

SECONDS = 440.0  # of all sections
SHARES = {
    "w4a16_gemm": 24, "hessian": 5, "gptq_block": 5, "w8a8_gemm": 12, "w4a8_gemm": 6, "fp4_gemm": 6, "fake_quant": 8,
    "whole_gptq": 22, "decode": 13,
}  # fmt: skip
OTHER = 4  # of an op that is not listed
WHOLE = ("whole_gptq", "decode")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.merge:
        return merge(arguments.merge)
    unpacked = wheels.unpacked()
    if unpacked:
        print(f"bench_ops: {len(unpacked)} wheels of {wheels.folder()} are used where no installed package is")
    try:
        chosen = cases([op for op in arguments.ops if op not in WHOLE], tiny=arguments.check)
    except ValueError as error:
        print(f"bench_ops: {error}, {', '.join(WHOLE)}", file=sys.stderr)
        return 2
    if arguments.ops and all(op in WHOLE for op in arguments.ops):
        chosen = []
    whole = [part for part in WHOLE if not arguments.ops or part in arguments.ops]
    if arguments.list:
        print("\n".join([*(f"{case.op}: {case.shape}" for case in chosen), *whole]))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.check:
        return check(chosen, whole, device)
    if device.type != "cuda":
        print(
            f"bench_ops: no CUDA GPU here (torch {torch.__version__} sees none), so nothing was measured and nothing "
            f"written; run it on a machine with one, or --check the ops on this CPU",
            file=sys.stderr,
        )
        return 1
    return bench(chosen, whole, arguments, device)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ops and whole runs on the GPU of this machine")
    parser.add_argument("--ops", nargs="*", default=[], help=f"only these, of the ops and {', '.join(WHOLE)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it; the rest stays empty")
    parser.add_argument("--rounds", type=int, default=50, help="replays of each graph, at most")
    parser.add_argument("--dry", action="store_true", help="print, write no files")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--merge", type=Path, help="one report of the results in the folders of this one, and end")
    parser.add_argument("--check", action="store_true", help="check tiny shapes against float64 and end; any machine")
    return parser.parse_args(words)


def check(chosen: Sequence[Case], whole: Sequence[str], device: torch.device) -> int:
    """Tiny shapes of all ops, and the model sections with a tiny model; 1 if a check fails."""
    faults = []
    for case in chosen:
        outcome = checked(case, device)
        errors = {name: f"{error:.1e}" for name, error in outcome.errors.items()}
        print(outcome.op, outcome.shape, errors, outcome.left_out or "", outcome.note, flush=True)
        faults.append(outcome.note)
    if "whole_gptq" in whole:
        gptq = whole_gptq.run(whole_gptq.TINY, device)
        print("whole_gptq", {name: f"{seconds:.3f} s" for name, seconds in gptq.stages.items()}, gptq.note, flush=True)
        faults.append("" if gptq.skipped else gptq.note)
    if "decode" in whole:
        decoded = decode.run(decode.TINY, device)
        print("decode", {name: f"{error:.1e}" for name, error in decoded.errors.items()}, decoded.note, flush=True)
        faults.append(decoded.note)
    return int(any(faults))


def bench(chosen: Sequence[Case], whole: Sequence[str], arguments: argparse.Namespace, device: torch.device) -> int:
    begun = time.monotonic()
    gc.freeze()  # each capture of a graph may collect garbage
    torch._dynamo.config.recompile_limit = 64  # else a function is eager after 8 shapes
    before = clocks()
    results = Results(*rates(device, arguments.rounds))
    name = torch.cuda.get_device_name(device)
    print(f"{name}: {rates_line(results)}", flush=True)
    spent: dict[str, float] = {}  # by contestant, in first calls
    ends = deadlines([*dict.fromkeys(case.op for case in chosen), *whole], begun, arguments.seconds)
    for section, end in ends.items():
        start = time.monotonic()
        if section == "whole_gptq":
            results.gptq = whole_gptq.run(whole_gptq.LLAMA, device, end)
            print(section, results.gptq.stages, results.gptq.note, flush=True)
        elif section == "decode":
            results.decoded = decode.run(decode.LLAMA, device, end, results.copied)
            print(section, results.decoded.tokens_per_second, results.decoded.note, flush=True)
        else:
            of_section = [case for case in chosen if case.op == section]
            left = measure(of_section, results, arguments.rounds, device, end, spent)
            if left:
                results.cut.append(f"{section}: {left} of {len(of_section)} shapes")
        results.seconds[section] = time.monotonic() - start
        fault = context_fault(device)
        if fault:
            results.cut.append(f"everything after {section}: the CUDA context has ended, {fault}")
        if not arguments.dry:
            print("written:", write(results, about(name, before)), flush=True)
        if fault:
            print(f"bench_ops: {results.cut[-1]}", file=sys.stderr)
            return 3
        torch.cuda.empty_cache()
    print("\n".join(goals_table(results.goals)))
    return int(any(outcome.note.startswith("wrong") for outcome in results.outcomes))


def about(name: str, before: Mapping[str, str]) -> dict[str, Any]:
    """What the results were measured with."""
    return {
        "gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda, "packages": wheels.versions(),
        "clocks": {"before": before, "now": clocks()},
    }  # fmt: skip


def context_fault(device: torch.device) -> str:
    """The error that every CUDA call of this process raises from now on (an illegal access, say); empty: none."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def merge(folder: Path) -> int:
    """One report of the results of several processes; 2 where there are none."""
    files = sorted(folder.glob("*/ops_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        print(f"bench_ops: no results in {folder}: expected */ops_*.json", file=sys.stderr)
        return 2
    results, facts = merged([json.loads(path.read_text(encoding="utf8")) for path in files])
    print("written:", write(results, facts))
    print("\n".join(goals_table(results.goals)))
    return 0


def deadlines(sections: Sequence[str], begun: float, seconds: float) -> dict[str, float]:
    """Deadline of each section; it may use the time that earlier sections did not use."""
    shares = [SHARES.get(section, OTHER) for section in sections]
    return {
        section: begun + seconds * sum(shares[: number + 1]) / sum(shares) for number, section in enumerate(sections)
    }


def measure(
    chosen: Sequence[Case], results: Results, rounds: int, device: torch.device, end: float, spent: dict[str, float]
) -> int:
    """Check and time the cases; returns the number of cases for which there was no time."""
    left = 0
    for number, case in enumerate(chosen):
        fits = time.monotonic() < end
        outcome = checked(case, device, spent) if fits else Outcome.of(case, note="not run: no time was left")
        results.add(outcome)
        left += not fits
        if fits and not outcome.note:
            names = [name for name in outcome.errors if name not in outcome.left_out]
            try:
                outcome.raw = rounds_of(case, device, names, rounds, outcome.left_out)
                outcome.times = {name: statistics.median(values) for name, values in outcome.raw.items()}
            except Exception as error:  # of any contestant; the other cases continue
                outcome.note = f"not timed: {first_line(error)}"
        if fits:
            shown = {name: f"{value:.1f} us" for name, value in outcome.times.items()}
            print(outcome.op, outcome.shape, shown, outcome.left_out or "", outcome.note, flush=True)
        if context_fault(device):
            return len(chosen) - number - 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return left


def clocks() -> dict[str, str]:
    """GPU, memory, power and temperature from nvidia-smi; empty without it."""
    asked = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked.split(","), answer.splitlines()[0].split(", "), strict=False))


if __name__ == "__main__":
    sys.exit(main())
