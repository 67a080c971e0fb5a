"""Is a result right? Each case against float64, on fresh random inputs, in memory that was full of NaN before."""

import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.op_case import Call, Case, Trial

__all__ = ["Outcome", "calls", "checked", "first_line"]

LOOSE = 10  # contestants may be so many times less exact: some compute in a coarser format
PATIENCE = 60.0  # seconds that a contestant may take for its first calls (compiling, tuning), over all cases


@dataclass
class Outcome:
    """What became of a case.

    Args:
        op: Folder under ops/.
        shape: As in the table.
        sizes: By letter.
        flop: As in the case; 0: the op is limited by memory only.
        errors: Relative errors by contestant, ``ours`` among them.
        times: Microseconds of a call, medians, of those that were right.
        raw: Microseconds of each round.
        floor: Microseconds that memory or tensor cores need at least.
        bound: ``memory`` or ``compute``: which of the two.
        left_out: Why a contestant was not timed.
        note: Why ours was not.
        moved: As in the case.
    """

    op: str
    shape: str
    sizes: dict[str, int] = field(default_factory=dict)
    flop: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    floor: float | None = None
    bound: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""
    moved: int = 0

    @classmethod
    def of(cls, case: Case, note: str = "") -> "Outcome":
        return cls(case.op, case.shape, dict(case.sizes), case.flop, note=note, moved=case.moved)


def checked(case: Case, device: torch.device, spent: MutableMapping[str, float] | None = None) -> Outcome:
    """Relative errors of all contestants that run here; a note when ours is wrong, or the case cannot be made.

    Args:
        case: The case.
        device: Where it runs.
        spent: Seconds that contestants have taken for their first calls so far; written.
    """
    outcome, spent = Outcome.of(case), {} if spent is None else spent
    try:
        trial = case.make(device, case.dtype, 12345)
        expected = [t.double() for t in parts(trial, trial.exact())]
        for name, call in calls(trial).items():
            if name != "ours" and spent.get(name, 0.0) > PATIENCE:
                outcome.left_out[name] = f"its first calls have taken more than {PATIENCE:.0f} s"
                continue
            begun = time.monotonic()
            try:
                with poisoned_memory() if name == "ours" else nullcontext():
                    results = parts(trial, call())
                pairs = zip(results, expected, strict=True)
                error = max(((r.double() - e).norm() / e.norm()).item() for r, e in pairs)
            except Exception as fault:
                if name == "ours":
                    raise
                outcome.left_out[name] = first_line(fault)  # a contestant may raise anything
                continue
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - begun
            outcome.errors[name] = error
            if name != "ours" and not error <= LOOSE * case.tolerance:
                outcome.left_out[name] = f"wrong: relative error {error:.1e}"
    except RuntimeError as fault:  # OutOfMemoryError is one
        outcome.note = f"not run: {first_line(fault)}"
        return outcome
    if not outcome.errors["ours"] <= case.tolerance:  # NaN is wrong too
        outcome.note = f"wrong: relative error {outcome.errors['ours']:.1e}, at most {case.tolerance:.0e} was expected"
    return outcome


def calls(trial: Trial) -> dict[str, Call]:
    return {"ours": trial.ours, **trial.contestants}


def parts(trial: Trial, result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [trial.part(t) for t in (result if isinstance(result, tuple) else (result,))]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated and not written is NaN (torch fills it where algorithms must be deterministic).

    Not for contestants: what torch compiled for one such mode it would compile once more for the other.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each op that has no deterministic way
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def first_line(error: BaseException) -> str:
    """Type and first line, fit for a cell of a table."""
    text: Any = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".replace("|", "/")
