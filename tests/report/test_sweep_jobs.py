"""Folders of sweeps: each job with its overrides, those that failed, and those that never started."""

from itertools import chain

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_compress.report import sweep_jobs
from lightning_compress.report.sweep_jobs import Job, differing_keys, read_jobs
from tests.support.sweep_folders import summary_of, write_job, write_multirun

TASK = ["+compress=gptq_w4,[smoothquant,gptq_w8a8]", "seed=1,2", "trainer=cpu"]


def test_jobs_with_their_overrides_and_summaries(tmp_path):
    write_multirun(tmp_path, TASK)
    for number, recipe in enumerate(("gptq_w4", "[smoothquant,gptq_w8a8]")):
        for seed in (1, 2):
            overrides = [f"+compress={recipe}", f"seed={seed}", "trainer=cpu"]
            write_job(tmp_path / str(2 * number + seed - 1), overrides, summary_of(100 * seed, 5.5))
    jobs = read_jobs(tmp_path)
    assert [job.name for job in jobs] == ["0", "1", "2", "3"]
    assert jobs[3].overrides == {"compress": "[smoothquant,gptq_w8a8]", "seed": "2", "trainer": "cpu"}
    assert jobs[3].summary == summary_of(200, 5.5)
    assert not any(job.fault for job in jobs)
    assert differing_keys(jobs) == ["compress", "seed"]


def test_jobs_that_failed_or_never_started_say_so(tmp_path):
    write_multirun(tmp_path, TASK)
    write_job(tmp_path / "0", ["+compress=gptq_w4", "seed=1"])
    (tmp_path / "0" / "train.log").write_text("Traceback\n  File\nValueError: no such layer\n\n")
    write_job(tmp_path / "1", ["+compress=gptq_w4", "seed=2"])
    write_job(tmp_path / "2", ["+compress=[smoothquant,gptq_w8a8]", "seed=1"], summary_of(1, 1.0))
    (tmp_path / "2" / "report" / "summary.json").write_text('{"model_')
    jobs = read_jobs(tmp_path)
    assert [job.fault.split(":")[0] for job in jobs] == [
        "it has no report/summary.json; train.log ends", "it has no report/summary.json; it has no log",
        "its report/summary.json cannot be read", "it has no folder",
    ]  # fmt: skip
    assert jobs[0].fault.endswith("train.log ends: ValueError: no such layer")
    assert jobs[3].overrides == {"compress": "[smoothquant,gptq_w8a8]", "seed": "2", "trainer": "cpu"}


def test_the_error_is_found_before_what_was_logged_after_it(tmp_path):
    job = write_job(tmp_path / "0", [])
    (job / "train.log").write_text(
        "Traceback (most recent call last):\n  File\nKeyError: 1\n\nDuring handling ...\n\n"
        "Traceback (most recent call last):\n  File x\n    raise\n    ^^^^^\nValueError: no such layer\nadvice\n"
        "[12:00] done\n"
    )
    assert read_jobs(tmp_path)[0].fault.endswith(
        "; train.log ends: [12:00] done (its last error: ValueError: no such layer)"
    )


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        ["seed=range(1,4)", "+x=choice(a,'b c',{k: [1,2]})", "~logger", "++y=null"],
        ["a=1", "a=2,3", r"b=x\,y,z"],
        [],
    ],
    ids=str,
)
def test_missing_jobs_are_those_of_hydras_own_sweeper(tmp_path, task):
    write_multirun(tmp_path, task)
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(task), max_batch_size=None)
    ours = [job.overrides for job in read_jobs(tmp_path)]
    assert ours == [sweep_jobs._by_key(command) for command in chain(*theirs)]


def test_parameters_of_the_sweepers_config_count(tmp_path):
    write_multirun(tmp_path, ["trainer=cpu"], params={"seed": "1,2,3"})
    assert [job.overrides["seed"] for job in read_jobs(tmp_path)] == ["1", "2", "3"]


def test_numbers_are_hydras_and_not_the_folders_names(tmp_path):
    write_multirun(tmp_path, ["seed=5,6,7"])
    write_job(tmp_path / "seed=6", ["seed=6"], summary_of(1, 1.0), hydra={"hydra": {"job": {"num": 1}}})
    assert [(job.name, job.overrides["seed"]) for job in read_jobs(tmp_path)] == [
        ("0", "5"), ("2", "7"), ("seed=6", "6"),
    ]  # fmt: skip


def test_a_sweeper_that_decides_while_it_runs_has_so_many_trials(tmp_path):
    write_multirun(tmp_path, ["seed=1,2"], _target_="x.OptunaSweeper", n_trials=3)
    write_job(tmp_path / "1", ["seed=2"], summary_of(1, 1.0))
    assert [(job.name, bool(job.fault)) for job in read_jobs(tmp_path)] == [("0", True), ("1", False), ("2", True)]


def test_a_number_of_jobs_that_cannot_be_known_is_a_fault_and_not_silence(tmp_path):
    write_multirun(tmp_path, ["+compress=glob(gptq*)"])
    write_job(tmp_path / "0", ["+compress=gptq_w2"], summary_of(1, 1.0))
    first, last = read_jobs(tmp_path)
    assert (first.name, first.fault) == ("0", "")
    assert last.name == "multirun.yaml"
    assert "jobs that did not start are not listed, since their number is unknown" in last.fault


def test_damaged_files_of_hydra_are_named(tmp_path):
    write_job(tmp_path / "a" / "0", [], summary_of(1, 1.0))
    (tmp_path / "a" / "0" / ".hydra" / "overrides.yaml").write_text("[unclosed")
    (tmp_path / "a" / "multirun.yaml").write_bytes(b"\xff\xfe\x00")
    jobs = read_jobs(tmp_path)
    assert [job.name for job in jobs] == ["a/0", "a/multirun.yaml"]
    assert f"{tmp_path / 'a' / '0' / '.hydra' / 'overrides.yaml'} cannot be read: " in jobs[0].fault
    assert "multirun.yaml cannot be read: " in jobs[1].fault


def test_single_runs_need_no_multirun_and_sort_as_numbers(tmp_path):
    for task in ("10", "9"):
        write_job(tmp_path / "array 77" / task, [f"seed={task}"], summary_of(1, 1.0))
    (tmp_path / "plain" / "report").mkdir(parents=True)
    (tmp_path / "plain" / "report" / "summary.json").write_text("{}")
    assert [job.name for job in read_jobs(tmp_path)] == ["array 77/9", "array 77/10", "plain"]


def test_what_the_callbacks_monitor(tmp_path):
    callbacks = {
        "model_checkpoint": {"_target_": "x", "monitor": "val/acc", "mode": "max"},
        "early": {"monitor": "val/loss"}, "bar": {"refresh_rate": 1}, "none": None,
    }  # fmt: skip
    write_job(tmp_path / "0", [], summary_of(1, 1.0), config={"callbacks": callbacks})
    assert read_jobs(tmp_path)[0].modes == {"val/acc": "max", "val/loss": "min"}


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^no run in .*: expected folders that hold \.hydra/overrides\.yaml or"):
        read_jobs(tmp_path)
    with pytest.raises(ValueError, match="is not a folder; expected the folder of a sweep"):
        read_jobs(tmp_path / "nowhere")


def test_an_override_that_one_job_lacks_differs():
    jobs = [Job("0", {"a": "1", "seed": "1"}), Job("1", {"seed": "1"})]
    assert differing_keys(jobs) == ["a"]
    assert differing_keys(jobs[:1]) == []
