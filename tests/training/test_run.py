"""What one run carries: seconds add up, and checkpoints get the facts that cannot be measured again."""

import pytest

from lightning_compress.training import run as module
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.run import Run


def test_seconds_of_a_phase_add_up(monkeypatch):
    run, times = Run(CallbackOptions(), {}), iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    for _ in range(2):
        with run.timed("calibration"):
            pass
    assert run.seconds == {"calibration": pytest.approx(3.5)}


def test_checkpoints_carry_what_a_resumed_run_cannot_measure_again():
    run = Run(CallbackOptions(), {}, facts={"model_bytes_before": 7, "verify": {}})
    assert run.carried_facts == {"model_bytes_before": 7}
    run.add_repeated_batches(0)
    assert run.carried_facts == {"model_bytes_before": 7}
    run.add_repeated_batches(2)
    run.add_repeated_batches(3)
    assert run.carried_facts == {"model_bytes_before": 7, "batches_repeated_on_resume": 5}


def test_runs_have_names_and_objects_of_their_own():
    one, two = Run(CallbackOptions(), {}), Run(CallbackOptions(), {})
    assert one.name != two.name
    assert one.facts is not two.facts
    assert one.saved_files is not two.saved_files
