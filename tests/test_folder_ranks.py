"""From folder to folder on several ranks: the files of one process, also after a rank has ended."""

from functools import partial

import pytest

from lightning_compress import compress_folder
from lightning_compress.export.stream import ShardWriter
from lightning_compress.modifiers import AutoRoundModifier
from lightning_compress.resume.export_log import ExportLog
from lightning_compress.team import RankError, Team
from tests.support.processes import run_processes, vanish
from tests.test_folder import BATCHES, LAYERS, rows_of, write_llama

RECIPES = {"rtn_w4": None, "gptq_w4": BATCHES}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("dense") / "model")


def work(rank, source, target, recipe, ends_at=None):
    """The shards that this rank wrote, and the ledger or the error; rank 1 ends when block ``ends_at`` is finished."""
    written, write, store = [], ShardWriter.write, ExportLog.store

    def note(self, number, *args, **kwargs):
        written.append(number)
        write(self, number, *args, **kwargs)

    def end(self, title, modules):
        if rank == 1 and title.endswith(f".{ends_at}"):
            vanish()
        store(self, title, modules)

    ShardWriter.write, ExportLog.store = note, end  # the process is this test's own
    team = Team.of_processes()
    try:
        result = rows_of(compress_folder(source, target, recipe, RECIPES[recipe], team=team))
    except RankError as error:
        result = str(error)
    team.close()
    return written, result


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("recipe", "size", "shards"),
    [("rtn_w4", 3, [[1, 4], [2], [3]]), pytest.param("gptq_w4", 2, [[1, 2, 3, 4], []], marks=pytest.mark.slow)],
)
def test_files_and_ledger_are_those_of_one_process(tmp_path, source, recipe, size, shards):
    ledger = compress_folder(source, tmp_path / "alone", recipe, RECIPES[recipe])
    results = run_processes(partial(work, source=source, target=tmp_path / "out", recipe=recipe), tmp_path / "p", size)
    assert [written for written, _ in results] == shards
    assert all(rows == rows_of(ledger) for _, rows in results)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize(("recipe", "ranks"), [pytest.param("rtn_w4", 3, marks=pytest.mark.slow), ("gptq_w4", 1)])
def test_a_rank_that_ends_is_named_and_another_number_of_ranks_goes_on(tmp_path, source, recipe, ranks):
    job = partial(work, source=source, target=tmp_path / "out", recipe=recipe)
    (written, message), other = run_processes(partial(job, ends_at=1), tmp_path / "killed")
    assert other is None
    assert "failed on rank 1: it has ended" in message
    assert not (tmp_path / "out").exists()
    results = run_processes(job, tmp_path / "resumed", ranks)
    assert sorted(written + [number for numbers, _ in results for number in numbers]) == [*range(1, LAYERS + 2)]
    ledger = compress_folder(source, tmp_path / "alone", recipe, RECIPES[recipe])
    assert all(rows == rows_of(ledger) for _, rows in results)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_modifier_that_must_see_all_batches_is_refused(tmp_path, source):
    message = "AutoRoundModifier must see all batches, and cannot calibrate in a team of 2 ranks"
    with pytest.raises(ValueError, match=message):
        compress_folder(source, tmp_path / "out", AutoRoundModifier(scheme="W4A16"), BATCHES, team=Team(0, 2))
    assert not list(tmp_path.iterdir())
