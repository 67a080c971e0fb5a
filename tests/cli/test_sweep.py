"""``lightning-compress sweep``: exit codes, and what it prints."""

import pytest

from lightning_compress.cli import main
from tests.support.sweep_folders import summary_of, write_job, write_multirun


@pytest.fixture
def folder(tmp_path):
    write_multirun(tmp_path, ["seed=1,2"])
    write_job(tmp_path / "0", ["seed=1"], summary_of(2**20, 5.5))
    return tmp_path


def test_a_job_without_a_result_is_exit_code_1_and_named(folder, capsys):
    assert main(["sweep", str(folder)]) == 1
    assert "no result: job 1 (seed=2): it has no folder" in capsys.readouterr().out
    write_job(folder / "1", ["seed=2"], summary_of(2**19, 5.75))
    assert main(["sweep", str(folder)]) == 0
    assert (folder / "sweep.csv").read_text().count("\n") == 3


def test_another_metric_and_direction(folder, capsys):
    assert main(["sweep", str(folder), "--mode", "max"]) == 1
    assert "perplexity (larger is better)" in capsys.readouterr().out
    assert main(["sweep", str(folder), "--metric", "acc"]) == 2
    assert capsys.readouterr().err == "lightning-compress: no job has a metric 'acc'; their metrics: perplexity\n"


def test_a_folder_that_does_not_exist_is_exit_code_2(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "x")]) == 2
    assert f"lightning-compress: {tmp_path / 'x'} is not a folder" in capsys.readouterr().err
