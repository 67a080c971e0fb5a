"""The log of a calibration on shards (FSDP2, gloo processes): any number of ranks goes on from it, to equal files."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from lightning_compress import CompressionCallback, GPTQModifier, MagnitudePruningModifier, SparseGPTModifier
from lightning_compress.resume.folder_log import FolderLog
from tests.support.sharded_runs import Language, trainer
from tests.support.two_ranks import run_two_ranks

RECIPES: dict[str, Callable] = {
    "gptq": lambda: [GPTQModifier(scheme="W4A16", group_size=16)],
    "three_batches": lambda: [GPTQModifier(scheme="W4A16", group_size=16)],  # each rank has all of them
    "owl": lambda: [SparseGPTModifier(sparsity=0.5, sparsity_profile="owl", ignore=["lm_head"])],
    "no_data": lambda: [MagnitudePruningModifier(ignore=["lm_head"]), GPTQModifier(scheme="W4A16", group_size=16)],
}
CASES = [pytest.param(name, marks=() if name == "gptq" else pytest.mark.slow) for name in RECIPES]


class Killed(BaseException):
    """In place of a kill."""


@contextmanager
def stored_groups(stop: int | None) -> Iterator[list[str]]:
    """Titles of the groups that logs store; the process is killed after ``stop`` of them."""
    titles, store = [], FolderLog.store

    def counted(self, title, modules):
        store(self, title, modules)
        titles.append(title)
        if len(titles) == stop:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderLog, "store", counted)
        yield titles


def calibrate(folder: Path, name: str, ranks: int, stop: int | None = None) -> list[str]:
    """One attempt in a folder; the groups that it finished."""
    batches = 3 if name == "three_batches" else 4
    callback = CompressionCallback(RECIPES[name](), verify=False, evaluate=False, calibration_batches=batches)
    runner = trainer(folder, callback, ranks=ranks, max_epochs=0)
    with stored_groups(stop) as titles, suppress(Killed):
        runner.fit(Language())
    return titles


def files(folder: Path) -> dict[str, bytes]:
    names = [path.name for path in (folder / "compressed").iterdir() if path.name != "export_manifest.json"]
    return {name: (folder / "compressed" / name).read_bytes() for name in names}


def two_ranks(folder: Path, name: str, stop: int | None = None) -> list[str]:
    """The groups that both ranks of a new pair of processes have finished in a folder."""

    def work(rank: int) -> None:
        torch.save(calibrate(folder, name, 2, stop), folder / f"titles{rank}.pt")

    folder.mkdir(exist_ok=True)
    assert run_two_ranks(work, folder, 120) == ["", ""]
    zero, one = (torch.load(folder / f"titles{rank}.pt") for rank in (0, 1))
    assert zero == one
    return zero


@pytest.mark.parametrize("name", CASES)
def test_another_number_of_ranks_goes_on_to_the_same_files(tmp_path: Path, name: str) -> None:
    titles = calibrate(tmp_path / "one", name, 1)
    assert len(titles) == 4
    two_first = two_ranks(tmp_path / "two", name, stop=2)
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    assert two_first == titles[:2]
    assert calibrate(tmp_path / "two", name, 1) == titles[2:]
    assert calibrate(tmp_path / "three", name, 1, stop=1) == titles[2:3]
    assert two_ranks(tmp_path / "three", name) == titles[3:]
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")
    assert not (tmp_path / "three" / "calibration_log").exists()
