"""What a sweep leaves in its folder, and when Hydra's callback reports."""

import pytest
from omegaconf import OmegaConf

from lightning_compress.report.sweep_files import SweepReport, report_sweep
from lightning_compress.report.sweep_jobs import read_jobs
from tests.support.sweep_folders import summary_of, write_job, write_multirun

FILES = {"sweep.csv", "sweep.html", "sweep.md", "sweep.png"}


def files_of(folder):
    return {path.name for path in folder.iterdir() if path.is_file()} - {"multirun.yaml"}


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a sweep, [of two]"
    write_multirun(folder, ["seed=1,2"])
    write_job(folder / "0", ["seed=1"], summary_of(2**20, 5.5))
    return folder


def test_the_folder_gets_table_and_figure_and_the_screen_their_paths(folder, capsys):
    for _ in range(2):  # the second one replaces the files of the first
        comparison = report_sweep(folder, read_jobs(folder))
        assert [job.name for job in comparison.faults] == ["1"]
        assert files_of(folder) == FILES
        printed = capsys.readouterr().out
        assert "results of 1 of 2 jobs; perplexity" in printed
        paths = ", ".join(str(folder / name) for name in sorted(FILES))
        assert f"written: {paths}\n" in printed
    assert "![perplexity over size](sweep.png)" in (folder / "sweep.md").read_text()


def test_hydras_callback_reports_a_sweep_that_compressed(folder, capsys):
    SweepReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert files_of(folder) == FILES
    assert "no result: job 1 (seed=2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "variables", [{"SLURM_PROCID": "1"}, {"RANK": "1", "SLURM_PROCID": "0"}], ids=["srun", "torchrun"]
)
def test_one_task_of_several_reports(folder, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    SweepReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert files_of(folder) == set()
    assert capsys.readouterr().out == ""


def test_a_sweep_that_only_trains_gets_no_report(folder, capsys):
    (folder / "0" / "report" / "summary.json").unlink()
    SweepReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert files_of(folder) == set()
    assert capsys.readouterr().out == ""
