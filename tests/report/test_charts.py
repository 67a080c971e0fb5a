"""Where values lie in a chart: axes that show all of them, ticks that are round, error bars with their ends."""

import math
from itertools import pairwise

import pytest

from lightning_compress.report.charts import BOTTOM, LEFT, RIGHT, TOP, Value, axis_of, chart, text_of
from lightning_compress.report.page import template


def test_an_axis_is_logarithmic_from_a_decade_on():
    assert not axis_of([1.0, 9.9]).log
    assert axis_of([1.0, 10.0]).log
    assert not axis_of([-1.0, 10.0]).log
    assert not axis_of([0.0, 10.0]).log


@pytest.mark.parametrize(
    "values", [[3.0], [0.0], [1.0, 9.0], [1e-7, 3e-7], [1e-9, 1.0], [2.0, 700.0], [-5.0, 5.0], [5.35, 5.351], [1e12]]
)
def test_every_value_lies_inside_and_ticks_are_round_and_apart(values):
    axis = axis_of(values)
    places = [axis.place(value, 0, 100) for value in values]
    assert all(0 < place < 100 for place in places)
    assert places == sorted(places)
    assert 2 <= len(axis.ticks) <= 9
    for tick in axis.ticks:
        digits = f"{abs(tick):e}".partition("e")[0].rstrip("0").rstrip(".")
        assert len(digits) <= (5 if not axis.log else 1) + ("." in digits), tick
    texts = [text_of(tick) for tick in axis.ticks]
    assert len(set(texts)) == len(texts)


def test_places_on_a_logarithmic_axis():
    axis = axis_of([0.01, 1.0])
    assert axis.place(0.1, 0, 100) == pytest.approx(50, abs=0.1)
    assert axis.place(0.0, 0, 100) == 0
    assert axis.place(1e9, 0, 100) == 100


def test_points_lie_where_their_values_are():
    values = [Value("a", 0.0, 1.0, 0.5), Value("b", 1.0, 3.0), Value("c", 2.0, 2.0)]
    drawn = chart("title", values, "x", "y", x_names={0.0: "a", 1.0: "b", 2.0: "c"})
    a, b, c = drawn.points
    assert b.y < c.y < a.y  # SVG counts downwards
    assert c.y == pytest.approx((a.y + b.y) / 2, abs=0.1)
    assert (a.top + a.bottom) / 2 == pytest.approx(a.y, abs=0.1)
    assert b.top == b.bottom == b.y
    assert a.x - LEFT == pytest.approx(RIGHT - c.x, abs=0.1)
    assert drawn.x_ticks == [(a.x, "a"), (b.x, "b"), (c.x, "c")]


def test_an_error_bar_that_ends_below_zero_ends_at_the_axis():
    drawn = chart("title", [Value("a", 1.0, 0.1, 0.2), Value("b", 2.0, 10.0, 0.0)], "x", "y")
    assert drawn.points[0].bottom == BOTTOM
    assert TOP < drawn.points[0].top < drawn.points[0].y


def test_many_names_do_not_touch_each_other():
    names = {float(i): f"layer{i}" for i in range(60)}
    drawn = chart("title", [Value(name, x, 1.0 + x) for x, name in names.items()], "x", "y", x_names=names)
    places = [place for place, _ in drawn.x_ticks]
    assert min(b - a for a, b in pairwise(places)) > 7 * len("layer59")


def test_the_svg_holds_every_point_and_escapes_names():
    values = [Value("<b>&", 1.0, 2.0, 0.1, label="<i>"), Value("other", 2.0, 3.0, bold=False)]
    drawn = chart("a <title>", values, "x", "y", line=[(1.0, 2.0), (2.0, 3.0)], reference=(2.5, "dense"))
    text = template("charts.html.jinja").module.draw(drawn)
    assert text.count("<circle") == 2
    assert text.count('class="error"') == 1
    assert "&lt;b&gt;&amp;" in text
    assert "&lt;i&gt;" in text
    assert 'aria-label="a &lt;title&gt;"' in text
    first, second = (f"{point.x},{point.y}" for point in drawn.points)
    assert f'<polyline points="{first} {second}"/>' in text
    assert math.isclose(drawn.reference[0], (drawn.points[0].y + drawn.points[1].y) / 2, abs_tol=0.1)


def test_labels_of_points_that_are_close_are_beside_each_other():
    values = [Value(str(i), 1.0, 1.0 + i / 1000, label=str(i)) for i in range(12)] + [Value("far", 9.0, 9.0, label="1")]
    points = chart("title", values, "x", "y").points
    begins = [point.label_x for point in points[:12]]
    assert min(b - a for a, b in pairwise(begins)) >= 7
    assert begins[0] == pytest.approx(points[0].x + 5, abs=0.1)
    assert points[12].label_x == pytest.approx(points[12].x + 5, abs=0.1)
