"""The figure of a sweep: every job a point, only the front a line; labels are taken as they are."""

import logging

import pytest

from lightning_compress.report import sweep_figure
from lightning_compress.report.sweep import compare
from lightning_compress.report.sweep_jobs import Job
from tests.support.sweep_folders import summary_of


def comparison_of(*results, keys=("compress",), **others):
    jobs = [Job(str(i), dict.fromkeys(keys, f"r{i}$_{{"), summary_of(*result)) for i, result in enumerate(results)]
    return compare(jobs, **others)


@pytest.mark.parametrize(
    "results", [[(2**20, 5.5)], [(2**20, 5.5, None), (2**30, 500.0, 1.0)], [(1, 5.0)] * 41], ids=len
)
def test_a_png_and_nothing_else(tmp_path, results):
    pytest.importorskip("matplotlib")
    path = sweep_figure.metric_over_size(comparison_of(*results), tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [path]


def test_points_and_the_front(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b"")))
    comparison = comparison_of((2**21, 5.5), (2**20, 5.75), (2**22, 5.625), (2**20, "nan"))
    sweep_figure.metric_over_size(comparison, tmp_path / "sweep.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axes.get_lines()}
    assert lines["Pareto front"] == [(1, 5.75), (2, 5.5)]
    assert {y for _, y in lines["before compression"]} == {5.0}
    assert {text.get_text(): text.xy for text in axes.texts} == {
        "r0$_{": (2, 5.5), "r1$_{": (1, 5.75), "r2$_{": (4, 5.625),
    }  # fmt: skip


def test_several_overrides_are_named_by_their_keys():
    (result,) = comparison_of((1, 5.5), keys=("compress", "seed")).results
    assert sweep_figure._label(result, ["compress", "seed"]) == "compress=r0$_{ seed=r0$_{"
    assert sweep_figure._label(result, ["compress"]) == "r0$_{"
    assert sweep_figure._label(result, []) == "0"


def test_nothing_to_draw(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert sweep_figure.metric_over_size(comparison_of((1, "nan")), tmp_path / "sweep.png") is None
    assert "no job has both a size and a metric" in caplog.text
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert sweep_figure.metric_over_size(comparison_of((1, 5.5)), tmp_path / "sweep.png") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no figure of the sweep: matplotlib is missing; pip install 'lightning-compress[plot]'"
    ]
