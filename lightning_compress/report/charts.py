"""Charts for a page: where points, error bars and axes lie; charts.html.jinja draws them as SVG.

A picture is 400 units wide, so that text is readable on a phone; a page stretches it to at most 1.6 times that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Axis", "Chart", "Point", "Value", "axis_of", "chart", "text_of"]

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 390, 20, 172  # of the plot inside of the picture
LETTER, LINE = 7, 10  # width of a digit and height of a label
LOG_FROM = 10  # ratio of the largest to the smallest value from which an axis is logarithmic
TICKS = 5  # at most about so many


@dataclass(frozen=True)
class Value:
    """One value to draw: ``name`` is shown when a mouse is over it, ``label`` is written beside it."""

    name: str
    x: float
    y: float
    error: float = 0.0
    label: str = ""
    bold: bool = True


@dataclass(frozen=True)
class Point:
    """A value in the picture: ``top`` and ``bottom`` are the ends of its error bar, its label begins at ``label_x``."""

    name: str
    x: float
    y: float
    top: float
    bottom: float
    label: str
    label_x: float
    bold: bool


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` along one side of a picture, and the ticks on it."""

    low: float
    high: float
    log: bool
    ticks: Sequence[float]

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two places; a value beyond an end lies on it."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        number = math.log(max(value, self.low)) if self.log else value
        share = min(1.0, max(0.0, (number - low) / (high - low)))
        return round(start + share * (end - start), 1)


@dataclass(frozen=True)
class Chart:
    """What the template draws.

    Args:
        title: For readers that see no picture.
        x_label: Below the horizontal axis.
        y_label: Above the vertical axis.
        x_ticks: Places and texts.
        y_ticks: Places and texts.
        points: The values.
        line: Corners of the line through them, as SVG writes them; empty: no line.
        reference: Place and text of a dotted horizontal line; None: there is none.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    points: Sequence[Point]
    line: str
    reference: tuple[float, str] | None = None


def chart(
    title: str,
    values: Sequence[Value],
    x_label: str,
    y_label: str,
    *,
    x_names: Mapping[float, str] | None = None,
    line: Sequence[tuple[float, float]] = (),
    reference: tuple[float, str] | None = None,
) -> Chart:
    """A chart of values, at least one.

    Args:
        title: For readers that see no picture.
        values: The values, finite.
        x_label: Below the horizontal axis.
        y_label: Above the vertical axis.
        x_names: Ticks of the horizontal axis, in place of numbers.
        line: Corners of a line, such as a Pareto front.
        reference: Height and name of a dotted horizontal line.
    """
    heights = [height for v in values for height in (v.y - v.error, v.y, v.y + v.error)]
    heights = [h for h in heights if h > 0] if min(v.y for v in values) > 0 else heights  # a bar may end below zero
    y = axis_of([*heights, *([reference[0]] if reference else [])])
    x = axis_of([v.x for v in values]) if x_names is None else _named_axis(x_names)
    names = {tick: text_of(tick) for tick in x.ticks} if x_names is None else x_names

    def at(horizontal: float, vertical: float) -> tuple[float, float]:
        return x.place(horizontal, LEFT, RIGHT), y.place(vertical, BOTTOM, TOP)

    labels = _apart([(*at(v.x, v.y), v.label) for v in values])
    points = [
        Point(v.name, *at(v.x, v.y), at(v.x, v.y + v.error)[1], at(v.x, v.y - v.error)[1], v.label, label, v.bold)
        for v, label in zip(values, labels, strict=True)
    ]
    return Chart(
        title, x_label, y_label,
        [(x.place(tick, LEFT, RIGHT), names[tick]) for tick in x.ticks],
        [(y.place(tick, BOTTOM, TOP), text_of(tick)) for tick in y.ticks],
        points,
        " ".join(f"{a},{b}" for a, b in (at(*corner) for corner in line)),
        (at(values[0].x, reference[0])[1], reference[1]) if reference else None,
    )  # fmt: skip


def axis_of(values: Sequence[float]) -> Axis:
    """An axis that shows all values, with some room at its ends; logarithmic where they span a decade."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM:
        room = (high / low) ** 0.05
        low, high = low / room, high * room
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        every = 1 if len(factors) > 1 else math.ceil(len(decades) / TICKS)
        ticks = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
        return Axis(low, high, True, [tick for tick in ticks if low <= tick <= high])
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    step = _round_step((high - low) / TICKS)
    first = math.ceil(low / step)
    return Axis(low, high, False, [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)])


def text_of(number: float) -> str:
    """A tick's text, short: 0.001 and 1500, but 1e-05."""
    return f"{number:.6g}" if number else "0"


def _apart(labels: Sequence[tuple[float, float, str]]) -> list[float]:
    """Where each label begins, to the right of its point, and of the labels before that it would lie on."""
    boxes: list[tuple[float, float, float]] = []  # begin, end, height
    for x, y, text in labels:
        begin, width = x + 5.0, LETTER * len(text)
        while text and (
            ends := [end for b, end, at in boxes if abs(at - y) < LINE and b < begin + width and begin < end]
        ):
            begin = max(ends) + 2
        boxes.append((round(begin, 1), begin + width, y))
    return [begin for begin, _, _ in boxes]


def _named_axis(names: Mapping[float, str]) -> Axis:
    low, high = min(names), max(names)
    room = 0.06 * (high - low) or 1.0
    longest = max(len(text) for text in names.values())
    fitting = max(1, int((RIGHT - LEFT) / (LETTER * longest + 8)))
    return Axis(low - room, high + room, False, list(names)[:: math.ceil(len(names) / fitting)])


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
