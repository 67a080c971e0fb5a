"""Time the launches that an op could take on the CUDA GPU of this machine, and write the best into the op's table.

    make tune-gpu BENCH_ARGS="--ops w4a16_gemm --shapes 1x4096x4096 16x8192x8192"

A tool of the checkout, not of the package: it times with what bench_ops.py times with, and what it writes is shipped.
Each candidate is compiled first and left out where it spills or needs more shared memory than there is; then its result
is checked against float64, in poisoned memory; then eight at a time are timed beside the rule's launch, by CUDA-graph
replay over rotated buffers. A launch takes the place of the rule's where it is 2 % faster at least.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import checking, replay, wheels
from benchmarks.op_cases import Case
from benchmarks.tuned_ops import SUBJECTS, Subject

TOGETHER = 8  # candidates whose graphs are in memory at a time
BETTER = 0.98  # of the rule's time that a launch may take at most to replace it
TUNE_ROUNDS = 30

Check = Callable[[Case], dict[str, float]]
Clock = Callable[[Case, Sequence[str]], dict[str, float]]


@dataclass
class Found:
    """The entry for the table, and how many candidates were left out, with the first reason for each kind."""

    entry: dict[str, Any] | None
    tried: int
    refused: dict[str, str]


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    unknown = [op for op in arguments.ops if op not in SUBJECTS]
    if unknown:
        print(f"tune_ops: {', '.join(unknown)} has no table; expected {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    ops = arguments.ops or list(SUBJECTS)
    try:
        if arguments.shapes and len(ops) != 1:
            raise ValueError("--shapes are those of one op; name it with --ops")
        named = [sizes(word, SUBJECTS[ops[0]].sizes) for word in arguments.shapes]
    except ValueError as error:
        print(f"tune_ops: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"tune_ops: no CUDA GPU here (torch {torch.__version__} sees none); nothing was tuned", file=sys.stderr)
        return 1
    shapes = {op: named or SUBJECTS[op].usual for op in ops}
    return tune_all({op: SUBJECTS[op] for op in ops}, shapes, arguments, torch.device("cuda"))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tune the launches of ops on the GPU of this machine")
    parser.add_argument("--ops", nargs="*", default=[], help="only these; default: all that have a table")
    parser.add_argument("--shapes", nargs="*", default=[], help="such as 16x4096x4096; default: the usual ones")
    parser.add_argument("--seconds", type=float, default=1800, help="no shape begins after that")
    parser.add_argument("--dry", action="store_true", help="print, write no table")
    return parser.parse_args(words)


def sizes(word: str, names: Sequence[str]) -> tuple[int, ...]:
    """``16x4096x4096`` as numbers; ValueError when they are not as many as the op has sizes."""
    parts = word.lower().split("x")
    if len(parts) != len(names) or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"expected a shape {'x'.join(names)}, got {word!r}")
    return tuple(int(part) for part in parts)


def tune_all(
    subjects: dict[str, Subject], shapes: dict[str, list[tuple[int, ...]]], arguments: argparse.Namespace,
    device: torch.device,
) -> int:  # fmt: skip
    gpu, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    end = time.monotonic() + arguments.seconds
    check = lambda case: checking.checked(case, device).errors  # noqa: E731
    clock = lambda case, names: replay.times(case, device, names, TUNE_ROUNDS)  # noqa: E731
    wrong = 0
    for op, subject in subjects.items():
        for shape in shapes[op]:
            if time.monotonic() > end:
                print(f"{op} {shape}: not tuned, {arguments.seconds:.0f} s are over", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                fault = partial(subject.fault, shape, capability=capability, folder=Path(folder))
                found = tune(subject, shape, properties.multi_processor_count, fault=fault, check=check, clock=clock)
            print(op, shape, f"{found.tried} tried, left out: {found.refused};", found.entry or "none fits", flush=True)
            wrong += found.entry is None
            if found.entry is not None and not arguments.dry:
                subject.table.write(gpu, [found.entry])
    return int(wrong > 0)


def tune(
    subject: Subject, shape: tuple[int, ...], processors: int, *,
    fault: Callable[[Any], str | None], check: Check, clock: Clock,
) -> Found:  # fmt: skip
    """The best launch of a shape as an entry of the table.

    Args:
        subject: The op.
        shape: Its sizes.
        processors: Of the GPU.
        fault: Why a launch does not compile within the limits, or None.
        check: Relative errors of what a case computes, by name; without those that do not run.
        clock: Microseconds of a case's calls, by name, measured in turn.
    """
    launches, refused, tried = [], {}, 0
    for launch in subject.candidates(shape, processors):
        tried += 1
        if (reason := fault(launch)) is None:
            launches.append(launch)
        else:
            refused.setdefault(reason.split(":")[0], f"{launch}: {reason}")
    if not launches:
        return Found(None, tried, refused)
    first, *others = launches  # the rule's, where it compiles
    best, ratio, first_us = first, 1.0, None
    for start in range(0, max(1, len(others)), TOGETHER):
        together = {str(i): launch for i, launch in enumerate(others[start : start + TOGETHER])}
        case = subject.case(shape, first, together)
        errors = check(case)
        if not errors.get("ours", float("inf")) <= case.tolerance:
            refused.setdefault("wrong", f"{first}: relative error {errors.get('ours')}")
            return Found(None, tried, refused)
        right = [name for name in together if errors.get(name, float("inf")) <= case.tolerance]
        for name in together.keys() - right:
            refused.setdefault("wrong", f"{together[name]}: relative error {errors.get(name)}")
        times = clock(case, ["ours", *right])
        first_us = times["ours"] if first_us is None else first_us
        for name in right:
            if times[name] / times["ours"] < min(ratio, BETTER):
                best, ratio = together[name], times[name] / times["ours"]
    assert first_us is not None
    entry = subject.entry(shape, best) | {
        "us": round(first_us * ratio, 2), "rule_us": round(first_us, 2), "triton": str(wheels.versions().get("triton"))
    }  # fmt: skip
    return Found(entry, tried, refused)


if __name__ == "__main__":
    sys.exit(main())
