"""Gates: how much worse a metric may get by compression. Where one does not hold the run fails, its files written.

    gate: {metric: val/loss, max_increase: 0.02}                       change <= 0.02
    gate: {metric: val/accuracy, max_decrease: 1%}                     change >= -0.01 * |before|

The change is after - before: as in the report where compression comes after training, else against the dense model that
was measured before training began to compress. The estimate decides; its standard error is in the message.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Gate",
    "GateError",
    "check_metrics",
    "gate_failures",
    "judge",
    "judged_again",
    "raise_failures",
    "read_gates",
]

LIMITS = ("max_increase", "max_decrease")
KEYS = ("metric", *LIMITS, "rounds")
ROUNDS = 3
ONE = "{metric: val/loss, max_increase: 0.02}"


class GateError(RuntimeError):
    """A gate does not hold; all files of the run are written."""


@dataclass(frozen=True)
class Gate:
    """One limit.

    Args:
        metric: Its name, as the model logs it; of language models ``perplexity`` and ``nll`` too.
        limit: ``max_increase`` or ``max_decrease``.
        amount: Of the metric, or with ``relative`` its share of the value before.
        relative: The limit was written with a percent sign.
        rounds: With ``on_gate="promote"`` how often the run may compress again.
    """

    metric: str
    limit: str
    amount: float
    relative: bool
    rounds: int = ROUNDS

    def allowed(self, before: float) -> float:
        """The limit in units of the metric."""
        return self.amount * abs(before) if self.relative else self.amount

    def __str__(self) -> str:
        amount = f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"
        return f"{self.limit} {amount}"


def read_gates(value: Any) -> tuple[Gate, ...]:
    """The gates of the argument ``gate``: None, a mapping, or a list of mappings.

    Raises:
        ValueError: It is something else, a key is unknown, or a limit is missing or not a number.
    """
    if value is None:
        return ()
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(gate for entry in entries for gate in _read(entry))


def _read(entry: Any) -> list[Gate]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"gate: {entry!r} is a {type(entry).__name__}, expected a mapping such as {ONE}, or a list")
    if unknown := [key for key in entry if key not in KEYS]:
        raise ValueError(f"gate: unknown key {unknown[0]!r}; a gate has {', '.join(KEYS)}: {ONE}")
    metric, limits = entry.get("metric"), [name for name in LIMITS if entry.get(name) is not None]
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"gate: metric={metric!r}, expected the name of a metric: {ONE}")
    if not limits:
        raise ValueError(
            f"gate of {metric!r} has no limit: write max_increase (where less is better) or max_decrease (where more "
            f"is better): {ONE}"
        )
    rounds = entry.get("rounds", ROUNDS)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"gate of {metric!r}: rounds={rounds!r}, expected a whole number from 1 up")
    return [Gate(metric, name, *_amount(metric, name, entry[name]), rounds) for name in limits]


def _amount(metric: str, limit: str, value: Any) -> tuple[float, bool]:
    """The number, and whether it is a share."""
    relative = isinstance(value, str) and value.strip().endswith("%")
    try:
        if isinstance(value, bool):
            raise TypeError
        amount = float(value.strip().removesuffix("%") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        amount = math.nan
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"gate of {metric!r}: {limit}={value!r}, expected a number from 0 up, or a share such as '2%'")
    return (amount / 100, True) if relative else (amount, False)


def check_metrics(gates: Sequence[Gate], metrics: Sequence[str]) -> None:
    """ValueError where validation does not measure the metric of a gate.

    Args:
        gates: The gates.
        metrics: Names of what is measured; none: there is no validation loader.
    """
    if gates and not metrics:
        raise ValueError(
            f"gate of {gates[0].metric!r}: nothing was measured, since there is no validation loader; give the Trainer "
            f"one, or leave the gate out"
        )
    for gate in gates:
        if gate.metric not in metrics:
            raise ValueError(
                f"gate: unknown metric {gate.metric!r}; validation of this model measures {', '.join(metrics)}"
            )


def check_uncut(gates: Sequence[Gate]) -> None:
    """ValueError where a gate stands for a model that was cut at set-up: what it would be compared with is gone."""
    if gates:
        raise ValueError(
            f"gate of {gates[0].metric!r}: the model was cut at set-up, so that no dense model is left to measure; let "
            f"the modifier that cuts start after the first step, or leave the gate out"
        )


def judge(
    gates: Sequence[Gate],
    metric: Mapping[str, Mapping[str, Any]],
    dense: Mapping[str, Mapping[str, Any]] | None = None,
    dense_step: int | None = None,
) -> list[dict[str, Any]]:
    """One entry for each gate, as primitives for the report.

    Args:
        gates: The gates.
        metric: ``{name: {before, after, difference, standard_error}}``.
        dense: The same against the dense model, where training compressed; it counts.
        dense_step: The step at which that was measured.
    """
    return [_judged(gate, {**metric, **(dense or {})}[gate.metric], dense_step if dense else None) for gate in gates]


def _judged(gate: Gate, entry: Mapping[str, Any], dense_step: int | None) -> dict[str, Any]:
    before, after, error = entry["before"], entry["after"], entry.get("standard_error")
    change = after - before
    allowed = gate.allowed(before)
    worse = change if gate.limit == "max_increase" else -change
    held = worse <= allowed  # False for NaN
    since = "" if dense_step is None else f", the dense model of step {dense_step}"
    about = "" if error is None else f" ± {error:.2g}"
    share = f", here {allowed:.4g}" if gate.relative else ""
    text = (
        f"{gate.metric} {before:.6g} -> {after:.6g}{since}: {change:+.4g}{about}, {gate}{share}: "
        f"{'held' if held else 'not held'}"
    )
    return {
        "metric": gate.metric, "limit": str(gate), "allowed": allowed, "before": before, "after": after,
        "change": change, "standard_error": error, "dense_step": dense_step, "held": held, "text": text,
    }  # fmt: skip


def gate_failures(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of ``facts["gate"]`` that do not hold."""
    return [entry for entry in facts.get("gate", ()) if not entry["held"]]


def raise_failures(entries: Sequence[Mapping[str, Any]], where: str) -> None:
    """GateError where a gate does not hold; the message says what to do.

    Args:
        entries: As :func:`judge` gives them.
        where: The folder of the run.
    """
    failed = [entry for entry in entries if not entry["held"]]
    if not failed:
        return
    close = [
        e for e in failed if e["standard_error"] and abs(abs(e["change"]) - e["allowed"]) < 2 * e["standard_error"]
    ]
    unsure = (
        "; the limit is within two standard errors, so more validation batches may decide otherwise" if close else ""
    )
    raise GateError(
        f"gate: {'; '.join(str(entry['text']) for entry in failed)}{unsure}. Checkpoint, export and report are written "
        f"in {where}, and report/summary.json and the export's manifest say that the gate failed. Give the modules "
        f"with the largest errors (report/modules.csv) more bits or leave them dense, calibrate on more batches, or "
        f"raise the limit"
    )


def judged_again(gates: Sequence[Gate], entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The gates of now for a model that was compressed and judged before.

    Raises:
        ValueError: A gate is on a metric that was not judged then.
    """
    known = {str(entry["metric"]): entry for entry in entries}
    for gate in gates:
        if gate.metric not in known:
            raise ValueError(
                f"gate: {gate.metric!r} was not a gate when this run compressed its model, which was on "
                f"{', '.join(known) or 'no metric'}; delete compressed.ckpt to compress and measure again"
            )
    return [_judged(gate, known[gate.metric], known[gate.metric]["dense_step"]) for gate in gates]
