"""All results of a run on a GPU, in one report; those of several processes put together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import decode, machine, whole_gptq
from benchmarks.checking import Outcome
from benchmarks.goals import Goal, goals, goals_table
from benchmarks.op_report import op_tables

__all__ = ["Results", "merged", "rates_line", "report", "write"]


@dataclass
class Results:
    """All results so far.

    Args:
        copied: Bytes per second of a copy.
        multiplied: FLOP per second of a bf16 product.
        outcomes: Of the ops.
        gptq: Of the whole model.
        decoded: Of decoding.
        cut: What there was no time for.
        seconds: By section.
    """

    copied: float
    multiplied: float
    outcomes: list[Outcome] = field(default_factory=list)
    gptq: whole_gptq.Found | None = None
    decoded: decode.Found | None = None
    cut: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """One more, and its place in the roofline."""
        floors = {"memory": outcome.moved / self.copied * 1e6, "compute": outcome.flop / self.multiplied * 1e6}
        outcome.bound = max(floors, key=floors.__getitem__)
        outcome.floor = floors[outcome.bound]
        self.outcomes.append(outcome)

    @property
    def goals(self) -> list[Goal]:
        seconds = None if self.gptq is None else self.gptq.whole
        return goals(self.outcomes, seconds, None if self.decoded is None else self.decoded.ratio)


def write(results: Results, about: dict[str, Any]) -> Path:
    """Write the report and the figures behind it.

    Args:
        results: What was measured.
        about: With what: ``gpu``, ``torch``, ``cuda``, ``packages``, ``clocks``, and ``machine`` if it was another one.
    """
    facts = about | {
        "copied_bytes_per_s": results.copied, "bf16_flop_per_s": results.multiplied,
        "goals": [asdict(goal) | {"met": goal.met} for goal in results.goals],
        "whole_gptq": None if results.gptq is None else asdict(results.gptq),
        "decode": None if results.decoded is None else asdict(results.decoded),
        "cut": results.cut, "seconds": results.seconds, "cases": [asdict(outcome) for outcome in results.outcomes],
    }  # fmt: skip
    name = about["gpu"]
    return machine.write("ops", f"Kernels on one {name}", report(results, about), facts, gpu_slug(name))


def merged(parts: Sequence[dict[str, Any]]) -> tuple[Results, dict[str, Any]]:
    """The results of several processes, from what :func:`write` wrote; of an op that several measured, the last ones.

    Raises:
        ValueError: They are of several GPUs.
    """
    if len(names := sorted({part["gpu"] for part in parts})) != 1:
        raise ValueError(f"expected results of one GPU, got those of {', '.join(names)}")
    last = parts[-1]
    results = Results(*(max(part[rate] for part in parts) for rate in ("copied_bytes_per_s", "bf16_flop_per_s")))
    for part in parts:
        ops = {case["op"] for case in part["cases"]}
        results.outcomes = [outcome for outcome in results.outcomes if outcome.op not in ops]
        for case in part["cases"]:
            results.add(Outcome(**case))  # one roofline for all
        results.gptq = whole_gptq.Found(**part["whole_gptq"]) if part["whole_gptq"] else results.gptq
        results.decoded = decode.Found(**part["decode"]) if part["decode"] else results.decoded
        results.cut = [line for line in results.cut if line.partition(":")[0] not in part["seconds"]] + part["cut"]
        results.seconds |= part["seconds"]
    return results, {key: last[key] for key in ("gpu", "torch", "cuda", "packages", "clocks", "machine")}


def report(results: Results, about: dict[str, Any]) -> list[str]:
    """Markdown; cells without a measurement are empty."""
    packages = ", ".join(f"{package} {version}" for package, version in about["packages"].items())
    lines = [
        f"This GPU {rates_line(results)}; both measured here, and the roofline is made of them. torch "
        f"{about['torch']}, {packages}. Microseconds of a call, medians of graph replays over rotated buffers; "
        "ratio: theirs / ours, above 1 ours is faster. Empty: not measured.",
        "",
        "## Goals", "", *goals_table(results.goals), "",
    ]  # fmt: skip
    if results.cut:
        lines += ["Cut, for time:", "", *(f"- {what}" for what in results.cut), ""]
    if results.gptq is not None:
        lines += ["## GPTQ of a whole model", "", *whole_gptq.table(results.gptq), ""]
    if results.decoded is not None:
        lines += ["## Decoding", "", *decode.table(results.decoded), ""]
    return [*lines, "## Ops", "", *op_tables(results.outcomes)]


def rates_line(results: Results) -> str:
    return f"copies at {results.copied / 1e12:.2f} TB/s, multiplies bf16 at {results.multiplied / 1e12:.0f} TFLOP/s"


def gpu_slug(name: str) -> str:
    """``nvidia-h200`` of ``NVIDIA H200``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
