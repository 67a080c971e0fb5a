"""Two ranks, one of which gets the signal: both save, both leave, and with one exit code."""

import os
import re
import signal
from pathlib import Path
from typing import ClassVar

import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_compress.core import Needs
from lightning_compress.training import preemption
from tests.support.preempted_runs import Recorded, Signals, fit, outcome
from tests.support.training_runs import RoundingModifier
from tests.support.two_ranks import run_two_ranks
from tests.test_kill_resume import differences

TWO = {"strategy": "ddp", "devices": 2}


def both(folder: Path, *callbacks: Callback, modifier=None, module=Recorded, **options) -> list[str]:
    """One attempt on two ranks; the last line of what each of them raised."""

    def work(rank):
        if "SLURM_NTASKS" in os.environ:
            os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        fit(folder, *callbacks, modifier=modifier, module=module, **TWO, **options)

    folder.mkdir(exist_ok=True)
    ends = run_two_ranks(work, folder, 40)
    for path in folder.glob("failed*.txt"):
        path.unlink()
    return [re.sub(r"^\S*\.(?=\w+: )", "", end.strip().rpartition("\n")[2]) for end in ends]


@pytest.fixture
def two_tasks(slurm, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(preemption, "MOST_CALLS_BETWEEN_QUESTIONS", 1)
    return slurm


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_end", "on_validation_batch_end"])
def test_a_signal_to_either_rank_requeues_and_changes_no_bit(tmp_path, two_tasks, rank, hook):
    assert both(tmp_path / "whole") == ["", ""]
    assert both(tmp_path / "cut", Signals(signal.SIGUSR1, {hook: [2]}, rank)) == ["SIGTERMException: 143"] * 2
    assert two_tasks() == ["requeue 77"]
    assert both(tmp_path / "cut") == ["", ""]
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "cut")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_rank_outside_slurm(tmp_path, rank):
    signals = Signals(signal.SIGTERM, {"on_train_batch_start": [2]}, rank)
    assert both(tmp_path, signals, max_epochs=9) == ["SIGTERMException: 143"] * 2
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


class InCalibration(RoundingModifier):
    folder: str
    number: int = signal.SIGTERM
    rank: int = 0

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        os.kill(int(Path(self.folder, f"rank {self.rank}").read_text()), self.number)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_rank_in_calibration(tmp_path, rank):
    modifier = InCalibration(folder=str(tmp_path), rank=rank)
    assert both(tmp_path, Process(), modifier=modifier) == ["SIGTERMException: 143"] * 2
    assert not (tmp_path / "compressed").exists()


class Layered(Recorded):
    """Three blocks."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))

    def error(self, batch):
        return self(batch[0]).square().mean()

    def on_train_batch_end(self, *args):
        pass


class AtFirstBlock(RoundingModifier):
    """Writes down its blocks, and signals one rank at the end of the first one; all ranks walk."""

    needs: ClassVar[Needs] = Needs(calibration=True, team="weights")
    folder: str
    rank: int

    def group_state(self, modules):
        return {}

    def on_block_end(self, state, event, **kwargs):
        path = Path(self.folder, f"blocks {state.team.rank}")
        signals = not path.exists() and state.team.rank == self.rank
        with path.open("a") as file:
            file.write(f"{state.block_name or 'the rest'}, ")
        if signals:
            signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_leave_after_the_block_in_which_one_was_signalled_and_go_on_with_the_next(tmp_path, two_tasks, rank):
    modifier = AtFirstBlock(folder=str(tmp_path), rank=rank, data=False)
    assert both(tmp_path, modifier=modifier, module=Layered) == ["SIGTERMException: 143"] * 2
    files = [tmp_path / f"blocks {number}" for number in (0, 1)]
    assert [file.read_text() for file in files] == ["0, "] * 2
    assert not (tmp_path / "compressed").exists()
    assert both(tmp_path, modifier=modifier, module=Layered) == ["", ""]
    assert [file.read_text() for file in files] == ["0, 1, 2, the rest, "] * 2
    assert two_tasks() == ["requeue 77"]
    assert (tmp_path / "compressed").exists()


class Process(Callback):
    """Writes down the number of its process."""

    def on_train_start(self, trainer, pl_module):
        Path(trainer.default_root_dir, f"rank {trainer.global_rank}").write_text(str(os.getpid()))


ENDED = ["rank 0 has ended, or the connection to it", "failed on rank 1: it has ended, or the connection to it"]


class Dies(Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_training_is_named(tmp_path, rank):
    assert ENDED[rank] in both(tmp_path, Dies(rank))[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_calibration_is_named(tmp_path, rank):
    modifier = InCalibration(folder=str(tmp_path), number=signal.SIGKILL, rank=rank)
    assert ENDED[rank] in both(tmp_path, Process(), modifier=modifier)[1 - rank]
