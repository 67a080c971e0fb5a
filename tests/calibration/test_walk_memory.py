"""Whether one pass fits: the estimate by hand, the limit, and what the walk makes of them."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate, walker
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.probe import Probe
from lightning_compress.calibration.walk_memory import lockstep_bytes, memory_limit, workspace_bytes
from lightning_compress.layers.memory import bytes_of
from lightning_compress.team import Team
from tests.support.calibration_models import C, Layered, LockstepWatcher, make_batches, seeded, started
from tests.support.fake_cuda import fake_cuda
from tests.support.processes import run_processes

TOKENS = 4 * 2 * 5  # of four batches
# a Mixer: its hidden state, which is the input of q, k and v, and the input of out; R is 3 C for the former
ESTIMATE = int(1.25 * (TOKENS * 2 * C * 4 + 12 * C * C + 20 * 3 * C * C))


@pytest.mark.parametrize(
    ("text", "size"),
    [("300MB", 300_000_000), ("1.5 GiB", 1_610_612_736), (4096, 4096), ("4096", 4096), ("2kb", 2000), ("7 B", 7)],
)
def test_limits_in_bytes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["much", "300 M", "-1", "1e9", True, ""])
def test_other_limits_are_refused(text):
    with pytest.raises(ValueError, match=r"^memory_limit=.*: expected bytes, as a number or such as '300MB' or '2GiB'"):
        CalibrationOptions(memory_limit=text)


def test_the_largest_block_counts():
    probe = Probe(memory={"a": (1000, 0), "b": (10, 50_000)}, numbers=5)
    assert lockstep_bytes(probe, 10) == 1.25 * (10 * 10 / 5 + 50_000)
    assert lockstep_bytes(probe, 1000) == 1.25 * 1000 * 1000 / 5
    assert lockstep_bytes(Probe(), 10) == 0


def test_each_waiting_batch_has_a_workspace_on_a_gpu():
    with fake_cuda():
        assert workspace_bytes(torch.device("cuda:0"), 128) == 128 * 2**25
    assert workspace_bytes(torch.device("cpu"), 128) == workspace_bytes(None, 128) == 0


@pytest.mark.parametrize(("batches", "passes"), [(3, "one pass"), (4, "two passes")])
def test_more_batches_than_threads_are_allowed_take_two_passes(batches, passes, caplog, monkeypatch):
    monkeypatch.setattr(walker, "MOST_BATCHES", 3)
    watcher = LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(watcher, model=seeded(Layered)), make_batches(batches, 2, 5, C), CalibrationOptions())
    assert f"{passes} over 3 blocks: one pass" in caplog.text
    refusal = "two passes over 3 blocks: one pass has a thread for each batch, 4, and 3 are allowed"
    assert (refusal in caplog.text) == (batches == 4)
    assert bool([event for event, _ in watcher.events if event == "MODULE_READY"]) == (batches == 3)


@pytest.mark.parametrize(("limit", "passes"), [(ESTIMATE, "one pass"), (ESTIMATE - 1, "two passes")])
def test_the_limit_decides_between_one_pass_and_two(limit, passes, caplog):
    watcher = LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(
            *started(watcher, model=seeded(Layered)), make_batches(4, 2, 5, C), CalibrationOptions(memory_limit=limit)
        )
    assert f"{passes} over 3 blocks: one pass takes about 0 MB, and memory_limit allows 0 MB" in caplog.text
    assert bool([event for event, _ in watcher.events if event == "MODULE_READY"]) == (passes == "one pass")


def passes_of_a_rank(rank, limit):
    """Whether a rank that holds two batches of four walks in one pass."""
    team, watcher = Team.of_processes(), LockstepWatcher()
    lifecycle, state = started(watcher, model=seeded(Layered))
    held = {0, *team.mine(4)}  # as a Trainer deals them
    batches = [batch if i in held else None for i, batch in enumerate(make_batches(4, 2, 5, C))]
    calibrate(lifecycle, state.but(team=team), batches, CalibrationOptions(memory_limit=limit))
    return any(event == "MODULE_READY" for event, _ in watcher.events)


@pytest.mark.parametrize(("limit", "one_pass"), [(ESTIMATE, True), (ESTIMATE - 1, False)])
def test_the_limit_decides_alike_for_any_number_of_ranks(limit, one_pass, tmp_path):
    assert run_processes(partial(passes_of_a_rank, limit=limit), tmp_path) == [one_pass] * 2


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_a_walk_that_is_named_is_obeyed(walk, caplog):
    watcher = LockstepWatcher()
    options = CalibrationOptions(walk=walk, memory_limit=1)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(watcher, model=seeded(Layered)), make_batches(4, 2, 5, C), options)
    assert "memory_limit" not in caplog.text
    assert f"{walk.replace('_pass', '')} pass" in caplog.text


def test_without_a_limit_a_share_of_the_machine_counts():
    model = nn.Linear(1000, 1000)
    own = 1_001_000 * 4
    assert memory_limit(None, model, None) == pytest.approx(
        memory_limit(None, nn.Linear(1, 1), None) - 0.6 * (own - 8), abs=2
    )
    assert memory_limit("2GB", model, torch.device("cpu")) == 2 * 10**9
