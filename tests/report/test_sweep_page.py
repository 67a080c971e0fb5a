"""The page of a sweep: a point for each job, the front, links to the pages of the jobs, what failed and why."""

import re
from pathlib import Path

import pytest

from lightning_compress.report.sweep import compare
from lightning_compress.report.sweep_jobs import read_jobs
from lightning_compress.report.sweep_page import write_page
from tests.support.sweep_folders import summary_of, write_job, write_multirun


@pytest.fixture
def folder(tmp_path):
    """Five jobs: two on the front, one behind it, one that measured no number, one that failed."""
    folder = tmp_path / "a sweep, [of five]"
    write_multirun(folder, ["+compress=w4,w3,w2,nan,bad"])
    for name, job in enumerate([(2**21, 5.25), (2**20, 5.5), (2**21, 5.75), (2**20, "nan")]):
        write_job(folder / str(name), [f"+compress={['w4', 'w3', 'w2', 'nan'][name]}"], summary_of(*job))
    write_job(folder / "4", ["+compress=bad<b>"])
    (folder / "4" / "train.log").write_text("ValueError: no such recipe <b>\n")
    (folder / "0" / "report" / "index.html").write_text("the page of job 0")
    return folder


@pytest.fixture
def source(folder):
    write_page(compare(read_jobs(folder)), folder / "sweep.html")
    return (folder / "sweep.html").read_text()


def test_each_job_with_size_and_metric_is_a_point_and_those_on_the_front_are_bold(source):
    points = re.findall(r'<g class="(\w+)"><title>([^<]+)</title>', source)
    assert points == [
        ("bold", "0: 2 MiB, perplexity 5.25 ± 0.25"),
        ("bold", "1: 1 MiB, perplexity 5.5 ± 0.25"),
        ("pale", "2: 2 MiB, perplexity 5.75 ± 0.25"),
    ]
    assert source.count('class="error"') == 3
    assert ">before compression</text>" in source


def test_the_line_is_the_staircase_of_the_front(source):
    corners = [tuple(map(float, corner.split(","))) for corner in re.search(r'points="([^"]+)"', source)[1].split()]
    circles = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', source)]
    assert corners == [circles[1], (circles[0][0], circles[1][1]), circles[0]]


def test_rows_link_to_the_pages_that_exist(source, folder):
    links = re.findall(r'<a href="([^"]+)">([^<]+)</a>', source)
    assert links == [("0/report/index.html", "0")]
    assert (folder / Path(links[0][0])).read_text() == "the page of job 0"


def test_links_of_folders_with_odd_names_are_quoted(folder):
    job = folder / "lr=1e-3 [a]"
    write_job(job, ["lr=1e-3"], summary_of(2**20, 5.5))
    (job / "report" / "index.html").write_text("")
    write_page(compare(read_jobs(folder)), folder / "sweep.html")
    assert 'href="lr%3D1e-3%20%5Ba%5D/report/index.html"' in (folder / "sweep.html").read_text()


def test_what_failed_is_named_with_the_reason_and_escaped(source):
    assert "<b>4</b> <code>compress=bad&lt;b&gt;</code>" in source
    assert "train.log ends: ValueError: no such recipe &lt;b&gt;" in source
    assert "<b>0</b>" not in source


def test_it_needs_nothing_from_elsewhere(source):
    assert "<script" not in source
    assert "http" not in source


def test_a_sweep_without_any_result_has_a_page(tmp_path):
    write_job(tmp_path / "0", ["seed=1"])
    write_page(compare(read_jobs(tmp_path)), tmp_path / "sweep.html")
    source = (tmp_path / "sweep.html").read_text()
    assert "it has no report/summary.json; it has no log" in source
    assert "<svg" not in source
    assert "<table" not in source
