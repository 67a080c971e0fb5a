"""The comparison of jobs: the Pareto front by its definition, the metric and its direction, remarks."""

import math
import random

import pytest

from lightning_compress.report.sweep import Job, compare, pareto_front
from tests.support.sweep_folders import summary_of


def dominated(point: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    """Another point is at least as good in both, and better in one."""
    return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)


@pytest.mark.parametrize("values", [3, 10, 1000])  # few values: ties in one coordinate, and equal points
def test_the_front_is_what_no_other_point_dominates(values):
    draw = random.Random(values)
    for count in [*range(12)] * 25:
        points = [(float(draw.randrange(values)), -float(draw.randrange(values))) for _ in range(count)]
        assert pareto_front(points) == [not dominated(point, points) for point in points]


def test_a_point_that_is_not_finite_is_not_on_the_front_and_dominates_none():
    points = [(1.0, math.nan), (1.0, -math.inf), (math.nan, 0.0), (0.5, math.inf), (2.0, 3.0)]
    assert pareto_front(points) == [False, False, False, False, True]


def jobs_of(*results: tuple[int, float], metric: str = "perplexity", **others) -> list[Job]:
    return [
        Job(str(i), {"compress": f"r{i}"}, summary_of(*result, metric=metric), **others)
        for i, result in enumerate(results)
    ]


def front(jobs: list[Job], **arguments) -> list[str]:
    return [result.job.name for result in compare(jobs, **arguments).results if result.on_front]


def test_a_smaller_perplexity_is_better():
    assert front(jobs_of((100, 6.0), (200, 5.5), (300, 5.75), (100, 7.0))) == ["0", "1"]


def test_the_config_says_whether_more_is_better():
    jobs = jobs_of((100, 0.5), (200, 0.25), (300, 0.75), metric="val/acc", modes={"val/acc": "max", "val/loss": "min"})
    comparison = compare(jobs)
    assert (comparison.metric, comparison.mode) == ("val/acc", "max")
    assert front(jobs) == ["0", "2"]
    assert front(jobs, mode="min") == ["0", "1"]


def test_a_metric_whose_direction_nothing_says_is_refused():
    with pytest.raises(ValueError, match=r"^is a smaller or a larger 'f' better\? no callback .*; give --mode min or"):
        compare(jobs_of((1, 1.0), metric="f"))


def test_configs_that_contradict_each_other_are_refused():
    jobs = [*jobs_of((1, 1.0), metric="f", modes={"f": "min"}), *jobs_of((1, 1.0), metric="f", modes={"f": "max"})]
    with pytest.raises(ValueError, match="the jobs' configs differ in it; give --mode"):
        compare(jobs)


def test_a_metric_that_no_job_has_is_refused_by_name():
    with pytest.raises(ValueError, match="^no job has a metric 'foo'; their metrics: perplexity$"):
        compare(jobs_of((1, 1.0)), metric="foo")


def test_seconds_add_up_and_words_for_nan_are_numbers():
    job = Job("0", {}, summary_of(100, "nan") | {"seconds": {"a": 1.5, "b": 0.25}})
    (result,) = compare([job]).results
    assert result.seconds == 1.75
    assert math.isnan(result.after)
    assert not result.on_front


def test_a_job_without_this_metric_and_one_without_an_export_are_named():
    jobs = jobs_of((100, 5.5), (50, 6.0), (25, 7.0))
    del jobs[1].summary["metric"]
    del jobs[2].summary["export_dir"]
    jobs[0].summary["verify"] = {"difference": 0.5, "fault": "plain transformers answers otherwise"}
    comparison = compare(jobs)
    assert comparison.notes == [
        "plain transformers answers otherwise: 0", "no perplexity was measured: 1", "nothing was exported: 2",
    ]  # fmt: skip
    assert [result.on_front for result in comparison.results] == [True, False, True]


def test_without_any_metric_sizes_are_left():
    job = Job("0", {}, {"model_bytes_after": 100})
    comparison = compare([job])
    assert comparison.metric is None
    assert comparison.results[0].size == 100
