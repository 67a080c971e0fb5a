"""The goals of the kernels, and what was reached: made of measurements, empty where there are none."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import machine
from benchmarks.checking import Outcome
from benchmarks.op_report import ratio

__all__ = ["Goal", "goals", "goals_table"]

DENSE = "matmul of dense weights"
FP8 = "torch _scaled_mm"
FP32_RESULT = "mm with float32 result"
BLOCK = "llm-compressor"
MANY_TOKENS = ((256, 2048), (2048, 1 << 62))  # docs/kernels.md says why they have two goals


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Args:
        what: Of what.
        aim: The value that is to be reached.
        unit: Behind the value.
        reached: None: not measured.
        count: Of how many shapes; None: of one run.
        at_most: The aim is an upper limit.
    """

    what: str
    aim: float
    unit: str
    reached: float | None
    count: int | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached <= self.aim if self.at_most else self.reached >= self.aim

    def cells(self) -> list[str]:
        shown = "" if self.reached is None else f"{self.reached:.2f}{self.unit}"
        of = f" ({self.count} shapes)" if shown and self.count else ""
        return [
            self.what,
            f"{'<=' if self.at_most else '>='} {self.aim:g}{self.unit}",
            shown + of,
            {None: "", True: "yes", False: "no"}[self.met],
        ]


def goals(outcomes: Sequence[Outcome], gptq_seconds: float | None, decode_ratio: float | None) -> list[Goal]:
    """All goals.

    Args:
        outcomes: Of the ops.
        gptq_seconds: Of the whole model; None where it did not come to its end.
        decode_ratio: Tokens per second with packed weights over those with dense ones.
    """

    def of(op: str, keep: Callable[[Outcome], bool] = lambda _: True) -> list[Outcome]:
        return [o for o in outcomes if o.op == op and "ours" in o.times and keep(o)]

    few = of("w4a16_gemm", lambda o: o.sizes["M"] <= 16)
    half, many = (of("w4a16_gemm", lambda o, low=low, end=end: low <= o.sizes["M"] < end) for low, end in MANY_TOKENS)
    eight = of("w8a8_gemm")
    given = [o for o in eight if not o.sizes.get("quantized")]
    quantized = [o for o in eight if o.sizes.get("quantized") and o.sizes["M"] <= 64]
    memory = sorted({o.op for o in outcomes} - {o.op for o in outcomes if o.flop})
    best = {id(o): best_other(o) for o in few}
    found = [
        goal("w4a16 over cuBLAS bf16, M <= 16, geometric mean", 2.2, "x", ratios(few, DENSE), mean),
        goal("w4a16 over cuBLAS bf16, M <= 16, smallest", 1.0, "x", ratios(few, DENSE), min),
        goal("w4a16 over the best other W4 kernel, M <= 16, geometric mean", 1.0, "x",
             [v for v in best.values() if v is not None], mean),
        *(goal(f"w4a16 at {N} x {K}, M <= 16, smallest share of the roofline", aim, " %",
               [share(o) for o in few if (o.sizes["N"], o.sizes["K"]) == (N, K)], min)
          for N, K, aim in ((8192, 8192, 60), (28672, 8192, 75))),
        goal("w4a16 over cuBLAS bf16, M = 256 to 2047, smallest", 0.55, "x", ratios(half, DENSE), min),
        goal("w4a16 over cuBLAS bf16, M >= 2048, smallest", 0.9, "x", ratios(many, DENSE), min),
        goal("w8a8 over _scaled_mm, smallest", 1.0, "x", ratios(given, FP8), min),
        goal("w8a8 with quantization over _scaled_mm, M <= 64, geometric mean", 1.3, "x",
             ratios(quantized, FP8), mean),
        goal("Hessian over mm with float32 result, geometric mean", 1.5, "x", ratios(of("hessian"), FP32_RESULT), mean),
        goal("Hessian over float32, geometric mean", 20, "x", ratios(of("hessian"), "float32"), mean),
        goal("GPTQ block over llm-compressor's kernel, smallest", 4, "x", ratios(of("gptq_block"), BLOCK), min),
        *(goal(f"{op}, smallest share of the copy rate", 85, " %", [share(o) for o in of(op) if o.floor], min)
          for op in memory),
        Goal("GPTQ W4 g128 of a Llama-3-8B-shaped model, 128 x 2048 tokens", 30, " s", gptq_seconds, at_most=True),
        Goal("decode of that model, batch 1, over bf16", 2, "x", decode_ratio),
    ]  # fmt: skip
    return found


def goal(
    what: str, aim: float, unit: str, values: Sequence[float], combine: Callable[[Sequence[float]], float]
) -> Goal:
    return Goal(what, aim, unit, combine(values) if values else None, len(values))


def mean(values: Sequence[float]) -> float:
    """The geometric one."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def ratios(rows: Sequence[Outcome], name: str) -> list[float]:
    return [found for row in rows if (found := ratio(row, name)) is not None]


def best_other(row: Outcome) -> float | None:
    """Over the fastest of the other kernels for the same packed weights; None where there is none."""
    others = [ratio(row, name) for name in row.times if name not in ("ours", DENSE)]
    return min((value for value in others if value is not None), default=None)


def share(row: Outcome) -> float:
    """Percent of the roofline."""
    assert row.floor is not None
    return 100 * row.floor / row.times["ours"]


def goals_table(found: Sequence[Goal]) -> list[str]:
    """Markdown."""
    return machine.table(["what", "goal", "reached", "met"], [goal.cells() for goal in found])
