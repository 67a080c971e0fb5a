"""The comparison as text: cells that add up by hand, each job in the CSV, brackets that no markup eats."""

import csv
import re

import pytest

from lightning_compress.report.sweep import compare
from lightning_compress.report.sweep_jobs import Job
from lightning_compress.report.sweep_table import render, write_csv, write_markdown
from tests.support.sweep_folders import summary_of


@pytest.fixture
def comparison():
    recipes = ["gptq_w4", "[smoothquant,gptq_w8a8]", "awq_w4"]
    sizes = [1024**2, 2 * 1024**2, 1024**2]
    jobs = [
        Job(str(i), {"compress": recipe, "trainer": "cpu"}, summary_of(size, after, error=error))
        for i, (recipe, size, after, error) in enumerate(
            zip(recipes, sizes, [5.5, 5.125, 5.75], [0.0625, None, 0.25], strict=True)
        )
    ]
    return compare([*jobs, Job("3", {"compress": "a|b", "trainer": "cpu"}, fault="it has no folder")])


ROWS = [
    ["0", "gptq_w4", "1 MiB", "4.25", "5.5", "+0.5 ± 0.062", "1.75", "*"],
    ["1", "[smoothquant,gptq_w8a8]", "2 MiB", "4.25", "5.125", "+0.125", "1.75", "*"],
    ["2", "awq_w4", "1 MiB", "4.25", "5.75", "+0.75 ± 0.25", "1.75"],
]
BELOW = ["no result: job 3 (compress=a|b): it has no folder", "before compression: perplexity 5, 4 MiB"]


def test_the_table_on_the_screen(comparison):
    lines = [line for line in render(comparison).splitlines() if line and not set(line) <= {"─"}]
    assert lines[0] == (
        "results of 3 of 4 jobs; perplexity (smaller is better), * marks the Pareto front of size and perplexity"
    )
    assert re.split(r"\s{2,}", lines[1]) == [
        "job", "compress", "size", "bits", "after", "change ± std. error", "seconds", "front",
    ]  # fmt: skip
    assert [re.split(r"\s{2,}", line) for line in lines[2:5]] == ROWS
    assert lines[5:] == BELOW


def test_jobs_that_began_with_other_metrics_show_them(comparison):
    comparison.results[0].job.summary["metric"]["perplexity"]["before"] = 4.5
    text = render(compare([result.job for result in comparison.results]))
    assert "before  after" in re.sub(r"\s{3,}", "  ", text)
    assert "before compression" not in text


def test_the_csv_holds_every_job_in_full(comparison, tmp_path):
    write_csv(comparison, tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open(newline="")))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["compress"] for row in rows] == ["gptq_w4", "[smoothquant,gptq_w8a8]", "awq_w4", "a|b"]
    assert [float(row["after"]) for row in rows[:3]] == [5.5, 5.125, 5.75]
    assert [row["error"] for row in rows] == ["0.0625", "", "0.25", ""]
    assert [row["size"] for row in rows] == ["1048576", "2097152", "1048576", ""]
    assert [row["on_front"] for row in rows] == ["1", "1", "0", ""]
    assert [row["fault"] for row in rows] == ["", "", "", "it has no folder"]
    assert "trainer" not in rows[0]  # the same in all jobs
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.csv"]


def test_the_markdown_holds_the_same_cells(comparison, tmp_path):
    write_markdown(comparison, tmp_path / "sweep.md", figure="sweep.png")
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    assert [[cell for cell in row if cell] for row in cells[2:]] == ROWS
    assert {len(row) for row in cells} == {8}
    assert [line.removeprefix("- ") for line in lines if line.startswith("- ")] == BELOW
    assert lines[-1] == "![perplexity over size](sweep.png)"
