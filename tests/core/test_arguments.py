"""Arguments: what is refused, and the line that says so."""

from typing import Any, Literal

import pytest
import torch

from lightning_compress.core import EventType, Modifier, State

E = EventType


class TargetModifier(Modifier):
    targets: list[str] = ["Linear"]
    block_size: int = 128

    def on_initialize(self, state, **kwargs):
        return True


class NeedyModifier(TargetModifier):
    sparsity: float


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (TargetModifier, {"taregts": ["x"]}, "TargetModifier: unknown argument 'taregts'; did you mean 'targets'?"),
        (TargetModifier, {"zzz": 1}, "unknown argument 'zzz'; known: index, group, start, .*, targets, block_size"),
        (TargetModifier, {"started_": True}, "unknown argument 'started_'"),  # an ordinary field in the reference
        (TargetModifier, {"_started": True}, "unknown argument '_started'"),
        (TargetModifier, {"block_size": "many"}, "TargetModifier: block_size='many': .*integer"),
        (TargetModifier, {"block_size": "many", "zzz": 1}, "(?s)block_size='many'.*\n.*'zzz'"),
        (TargetModifier, {"unit": "steps"}, "unit='steps': .*'step', 'epoch' or 'fraction'"),
        (TargetModifier, {"start": torch.inf}, "start=inf: Input should be a finite number"),
        (TargetModifier, {"update": 0}, "update=0.0 must be positive; leave it out"),
        (TargetModifier, {"start": 5, "end": 3}, r"end=3.0 must lie after start=5.0 \(unit: step\); leave end out"),
        (TargetModifier, {"start": 5, "end": 5}, "end=5.0 must lie after start=5.0"),  # such a window never opens
        (NeedyModifier, {}, "NeedyModifier: argument 'sparsity' is missing"),
    ],
)
def test_a_wrong_argument_is_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        cls(**arguments)
    assert "pydantic" not in str(raised.value)


class Numbers(Modifier):
    count: int | None = None
    size: int | Literal["auto"] | list[int] | None = None
    pattern: str = "unstructured"
    names: str | list[str] = []
    flag: bool = False
    either: bool | float = 0.5

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": True}, "count=True: expected a number"),
        ({"size": False}, "size=False: expected a number"),
        ({"start": True}, "start=True: expected a number"),
        ({"pattern": 124}, "pattern=124: expected text, got a number, which is how YAML reads 2:4; write it in quotes"),
        ({"names": 3}, "names=3: expected text, got a number; write it in quotes"),
        ({"start": float("nan")}, "start=nan: Input should be a finite number"),
        ({"start": 0, "end": float("inf")}, "end=inf: Input should be a finite number"),
        ({"unit": "fraction", "start": 25, "end": 75}, "start=25, end=75 lies after the end of the run, which is 1 in"),
        ({"self": 3}, "unknown argument 'self'"),
        ({"cls": 3}, "unknown argument 'cls'"),
    ],
)
def test_what_yaml_makes_of_a_slip_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Numbers(**arguments)


def test_what_is_meant_passes():
    made = Numbers(count=3, size="auto", flag=True, either=True, unit="fraction", start=0.25, end=1)
    assert (made.count, made.size, made.flag, made.either, made.end) == (3, "auto", True, True, 1.0)
