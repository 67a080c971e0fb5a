import copy
import time

import pytest
import torch
from torch import nn

from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.modifiers import GPTQModifier, TuneModifier
from lightning_compress.planning import trial
from lightning_compress.planning.sizes import model_bytes
from lightning_compress.planning.trial import Trial, estimate
from tests.planning.test_copies import Stack

START, SOLVE, PASS = 0.5, 0.25, 0.0625


def of_costs(model, modifiers, batches, options, forward, exports):
    """A machine on which trials take exactly what the formula says."""
    n, b = len(model.blocks), len(batches)
    seconds = START + n * (SOLVE + b * PASS)
    return Trial(seconds, 1000 + 10 * b, 0.1, export=0.125 * n, forward=0.0625 * n)


def test_costs_that_follow_the_formula_come_out_exactly(monkeypatch):
    monkeypatch.setattr(trial, "_run", of_costs)
    found = estimate(Stack(12), [], torch.ones(1, 8), 16, CalibrationOptions(), None)
    assert found.calibration == START + 12 * (SOLVE + 16 * PASS)
    ratio = model_bytes(Stack(12)) / model_bytes(Stack(1))
    assert (found.export, found.forward, found.memory) == (0.125 * ratio, 12 * 0.0625, 1000 + 10 * 16)


def test_training_after_the_walk_is_tried_on_two_batches(monkeypatch):
    counts = []

    def run(model, modifiers, batches, *others):
        counts.append(len(batches))
        return of_costs(model, modifiers, batches, *others)

    monkeypatch.setattr(trial, "_run", run)
    plan = estimate(Stack(12), [TuneModifier()], torch.ones(1, 8), 16, CalibrationOptions(), None)
    assert counts == [2, 2, 4, 2]
    assert (plan.calibration, plan.memory) == (START + 12 * (SOLVE + 16 * PASS), 1000 + 10 * 16)


def test_a_model_as_a_whole_grows_with_batches_alone(monkeypatch):
    def run(model, modifiers, batches, *others):
        return Trial(1 + len(batches) / 4, 100 * len(batches), 0.1, export=0.5, forward=0.25)

    monkeypatch.setattr(trial, "_run", run)
    found = estimate(nn.Sequential(nn.Linear(8, 8)), [], torch.ones(1, 8), 9, CalibrationOptions(), None)
    assert (found.calibration, found.export, found.memory) == (1 + 9 / 4, 0.5, 900)


def test_trials_that_take_too_long_are_not_made(monkeypatch):
    counted = []
    monkeypatch.setattr(trial, "_run", lambda *a: counted.append(1) or Trial(5.0, 0, 5.0))
    found = estimate(Stack(4), [], torch.ones(1, 8), 16, CalibrationOptions(), None)
    assert found == "a trial on one block took 5.0 s of CPU time"
    assert len(counted) == 1


def test_trials_leave_the_model_and_the_modifiers_as_they_are():
    model, modifier = Stack(3), GPTQModifier(scheme="W4A16", group_size=8)
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = estimate(model, [modifier], batch, 4, CalibrationOptions(), None)
    assert found.calibration > 0
    assert found.export > 0
    assert found.forward > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not modifier.initialized


def test_the_peak_counts_what_is_freed_again():
    with trial._peak() as peak:
        held = torch.ones(2**24, dtype=torch.float32)
        time.sleep(0.05)
        del held
    assert peak[0] == pytest.approx(2**26, rel=0.3)
