"""Schedules reach both ends exactly and never go back."""

from itertools import pairwise

import pytest

from lightning_compress.pruning.schedules import progress, value_at

CURVES = ["linear", "cosine", "cubic", "polynomial"]


@pytest.mark.parametrize("schedule", CURVES)
def test_ends_are_exact_and_the_curve_never_falls(schedule):
    values = [value_at(schedule, step / 97, 0.1, 0.7) for step in range(98)]
    assert values[0] == pytest.approx(0.1, abs=1e-15)
    assert values[-1] == 0.7
    assert all(a <= b + 1e-15 for a, b in pairwise(values))


def test_cubic_is_equation_1_of_zhu_and_gupta():
    initial, final, begin, span = 0.05, 0.9, 30.0, 200.0
    for t in (30.0, 77.0, 150.0, 230.0):
        paper = final + (initial - final) * (1 - (t - begin) / span) ** 3
        assert value_at("cubic", progress(t, begin, begin + span), initial, final) == pytest.approx(paper)


def test_polynomial_of_power_one_is_linear_and_of_power_three_cubic():
    for p in (0.0, 0.2, 0.55, 1.0):
        assert value_at("polynomial", p, 0, 1, power=1) == pytest.approx(value_at("linear", p, 0, 1))
        assert value_at("polynomial", p, 0, 1, power=3) == pytest.approx(value_at("cubic", p, 0, 1))


def test_constant_is_there_at_once_and_progress_is_held_at_its_ends():
    assert value_at("constant", 0.0, 0.0, 0.5) == 0.5
    assert (progress(-3, 0, 10), progress(5, 0, 10), progress(99, 0, 10)) == (0.0, 0.5, 1.0)
    assert (progress(3, 4, 4), progress(4, 4, 4)) == (0.0, 1.0)


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match="schedule='cubik' is unknown; expected one of constant, linear"):
        value_at("cubik", 0.5, 0, 1)
