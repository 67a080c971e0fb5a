"""Processes that work together (gloo, on this machine): sums, results, errors and ends that reach every rank."""

import logging
import pickle
import threading
import time
import warnings
from functools import partial

import pytest
import torch

from lightning_compress import team
from lightning_compress.team import RankError, Team
from tests.support.processes import run_processes, vanish


class Statistic:
    reduce = {"sum_C": "sum", "largest": "max", "smallest": "min", "count": "sum", "by_batch": "union"}

    def __init__(self, x_NC, batches):
        self.sum_C = x_NC.sum(0)
        self.largest = x_NC.max()
        self.smallest = float(x_NC.min())
        self.count = x_NC.shape[0]
        self.by_batch = {i: float(i) for i in batches}


def reducing(rank):
    team = Team.of_processes()
    assert (team.rank, team.size, team.alone) == (rank, 2, False)
    x_NC = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    whole = Statistic(x_NC, range(3))
    part = Statistic(x_NC[:7] if rank == 0 else x_NC[7:], team.mine(3))
    tensor = part.sum_C
    team.reduce_(part)
    torch.testing.assert_close(part.sum_C, whole.sum_C)
    assert part.sum_C is tensor  # in place
    assert (part.largest, part.smallest, part.count) == (whole.largest, whole.smallest, 30)
    assert type(part.count) is int
    assert part.by_batch == whole.by_batch

    part.sum_C = torch.full((2, 3), float(rank + 1)).T  # not contiguous
    team.reduce_(part, owner=1)
    if rank == 1:
        assert part.sum_C.tolist() == [[3, 3]] * 3

    tensors = [torch.full((2,), float(rank)), torch.full((3, 2), rank, dtype=torch.int8).T]
    team.broadcast_(tensors, owner=1)
    assert all((tensor == 1).all() for tensor in tensors)
    kinds = [torch.tensor(rank, dtype=torch.int16), torch.zeros(2, 3).bool() if rank else torch.ones(2, 3).bool()]
    kinds += [torch.full((3,), 1.5 - rank).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    team.broadcast_(kinds)
    assert (kinds[0].item(), kinds[1].all().item(), *[kind.float().tolist() for kind in kinds[2:]]) == (
        0, True, [1.5] * 3, [1.5] * 3
    )  # fmt: skip
    assert team.agree(rank == 1)
    assert not team.agree(False)
    assert team.largest(rank, 3.5 - rank) == [1, 3.5]
    return team.gather(rank * 10), Team.present().gather(rank)


def test_one_process_deals_to_itself():
    assert Team().deal(lambda: [[0, 1, 2]], "dealing") == [0, 1, 2]


def test_two_ranks_agree_with_one(tmp_path):
    assert run_processes(reducing, tmp_path) == [([0, 10], [0, 1])] * 2


def test_without_a_group_nothing_happens():
    team = Team.of_processes()
    assert team == Team() == Team.present()
    x_NC = torch.randn(5, 3)
    one, two = Statistic(x_NC, range(2)), Statistic(x_NC, range(2))
    team.reduce_(one)
    team.broadcast_([x_NC])
    team.close()
    assert vars(one).keys() == vars(two).keys()
    assert torch.equal(one.sum_C, two.sum_C)
    assert (team.gather(5), team.result(lambda: 6, "work"), team.agree(True)) == ([5], 6, True)
    assert team.largest(1.5, 2) == [1.5, 2]
    assert team.deal(lambda: ["mine"], "dealing") == "mine"
    team.fail(ValueError("nobody waits"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_ranks_come_to_is_shown_by_one(rank, caplog, recwarn):
    """Warnings of this package and its infos; errors, and the warnings of others, are shown by each."""
    logger = logging.getLogger("lightning_compress.calibration.walker")
    caplog.set_level(logging.INFO, logger="lightning_compress")
    with Team(rank, 2).one_voice():
        logger.info("one pass")
        logger.error("a fault")
        warnings.warn_explicit("no target", UserWarning, team.__file__, 1)
        warnings.warn("of a user", stacklevel=1)
    logger.info("afterwards")
    warnings.warn_explicit("later", UserWarning, team.__file__, 2)
    silent = {"one pass", "no target"} if rank else set()
    texts = {record.getMessage() for record in caplog.records} | {str(warning.message) for warning in recwarn}
    assert texts == {"one pass", "a fault", "no target", "of a user", "afterwards", "later"} - silent


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_batch_belongs_to_one_rank(size):
    shares = [Team(rank, size).mine(7) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(7))


def test_a_spawned_process_gets_a_team_of_its_own():
    assert pickle.loads(pickle.dumps(Team(1, 2, object()))) == Team()


def slow(rank):
    def work():
        time.sleep(4)  # longer than the timeout of the default group
        return {"from": rank}

    return Team.of_processes().result(work, "work")


def test_the_others_wait_longer_than_the_groups_timeout_and_get_the_result(tmp_path):
    assert run_processes(slow, tmp_path, timeout=3) == [{"from": 0}] * 2


def failing(rank):
    team = Team.of_processes()

    def work():
        raise ArithmeticError("singular")

    try:
        team.result(work, "calibration", owner=1)
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_failure_reaches_all(tmp_path):
    other = ("RankError", "calibration failed on rank 1: ArithmeticError: singular")
    assert run_processes(failing, tmp_path, size=3) == [other, ("ArithmeticError", "singular"), other]


def failing_between(rank):
    """Rank 2 fails in work of its own, while the others go on to an exchange."""
    team = Team.of_processes()
    try:
        if rank == 2:
            error = ValueError("NaN in batch 5")
            team.fail(error)
            raise error
        team.gather(rank, "block 3")
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_error_between_exchanges_is_raised_at_the_next(tmp_path):
    other = ("RankError", "block 3 failed on rank 2: ValueError: NaN in batch 5")
    assert run_processes(failing_between, tmp_path, size=3) == [other, other, ("ValueError", "NaN in batch 5")]


def deserting(rank, which):
    team = Team.of_processes()
    if rank == which:
        threading.Timer(0.3, vanish).start()
        time.sleep(5)
    try:
        team.gather(rank, "block 3")
    except RankError as error:
        return str(error)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_rank_that_has_ended_is_named(tmp_path, which):
    messages = run_processes(partial(deserting, which=which), tmp_path, size=3)
    assert messages.pop(which) is None
    for message in messages:
        assert f"rank {which}" in message
        assert "has ended" in message


def ending_after_its_answer(rank):
    team = Team.of_processes()
    if rank == 0:
        return team.gather(0)
    receive = team.star.receive
    team.star.receive = lambda peer: (time.sleep(0.5), receive(peer))[1]  # rank 0 has ended by then
    assert team.gather(1) == [0, 1]
    try:
        return team.gather(2)
    except RankError as error:
        return str(error)


def test_the_last_answer_of_a_rank_that_ends_counts(tmp_path):
    both, message = run_processes(ending_after_its_answer, tmp_path)
    assert both == [0, 1]
    assert message.startswith("rank 0 has ended")


def deserted(rank):
    def work():
        time.sleep(1)
        raise SystemExit(143)

    team = Team.of_processes()
    if rank == 1:
        threading.Timer(0.3, vanish).start()  # ended while it waits
    try:
        team.result(work, "calibration")
    except SystemExit as stop:
        return stop.code


def test_a_rank_keeps_its_own_error_when_the_others_are_gone(tmp_path):
    assert run_processes(deserted, tmp_path) == [143, None]
