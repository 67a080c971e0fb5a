"""Gates: what they take, when they hold, and what a run leaves behind where one does not."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import (
    CompressionCallback,
    MagnitudePruningModifier,
    QuantizationModifier,
    StructuredPruningModifier,
)
from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.training.gate import GateError, judge, read_gates
from tests.support.training_runs import Regression, Sums, quiet, rounding
from tests.support.two_ranks import run_two_ranks

LOSS = {"metric": "val/mse", "max_increase": 0.1}
WRONG = [
    ("val/mse", "gate: 'val/mse' is a str, expected a mapping such as {metric: val/loss, max_increase: 0.02}"),
    ({"metric": "a", "max": 1}, "gate: unknown key 'max'; a gate has metric, max_increase, max_decrease"),
    ({"max_increase": 1}, "gate: metric=None, expected the name of a metric"),
    ({"metric": "a"}, r"gate of 'a' has no limit: write max_increase \(where less is better\) or max_decrease"),
    ({"metric": "a", "max_increase": -0.1}, "max_increase=-0.1, expected a number from 0 up, or a share such as '2%'"),
    ({"metric": "a", "max_increase": True}, "max_increase=True, expected a number"),
    ({"metric": "a", "max_decrease": "much"}, "max_decrease='much', expected a number"),
    ([LOSS, {"metric": "a", "max_decrease": "nan%"}], "max_decrease='nan%', expected a number"),
]


@pytest.mark.parametrize(("gate", "message"), WRONG, ids=str)
def test_what_is_not_a_gate_is_refused_when_the_callback_is_built(gate, message):
    with pytest.raises(ValueError, match=message):
        rounding(gate=gate)


def test_a_gate_needs_the_metric():
    with pytest.raises(ValueError, match="gate of 'val/mse' needs the metric, which evaluate=False does not measure"):
        rounding(gate=LOSS, evaluate=False)


def verdict(limit: str, amount: float | str, before: float, after: float) -> bool:
    entry = {"before": before, "after": after, "difference": after - before, "standard_error": None}
    (judged,) = judge(read_gates({"metric": "m", limit: amount}), {"m": entry})
    return judged["held"]


@pytest.mark.parametrize(
    ("limit", "amount", "before", "after", "held"),
    [
        ("max_increase", 0.5, 2.0, 2.5, True), ("max_increase", 0.5, 2.0, 2.625, False),
        ("max_increase", 0.0, 2.0, 1.0, True), ("max_increase", "25%", 2.0, 2.5, True),
        ("max_increase", "24%", 2.0, 2.5, False), ("max_increase", "25%", -2.0, -1.5, True),
        ("max_decrease", 0.5, 2.0, 1.5, True), ("max_decrease", 0.5, 2.0, 1.25, False),
        ("max_decrease", "1 %", 2.0, 9.0, True), ("max_increase", 9, 2.0, math.nan, False),
        ("max_decrease", 9, 2.0, math.nan, False), ("max_increase", "1e-3", 2.0, 2.01, False),
    ],
)  # fmt: skip
def test_a_gate_bounds_the_change_in_one_direction(limit, amount, before, after, held):
    assert verdict(limit, amount, before, after) == held


def test_the_text_has_metric_values_error_limit_and_the_dense_model():
    entry = {"before": 2.0, "after": 2.5, "difference": 0.5, "standard_error": 0.0312}
    (judged,) = judge(read_gates({"metric": "nll", "max_increase": "10%"}), {"nll": {}}, {"nll": entry}, 7)
    expected = "nll 2 -> 2.5, the dense model of step 7: +0.5 ± 0.031, max_increase 10%, here 0.2: not held"
    assert judged["text"] == expected


def test_two_limits_and_a_list_of_gates_all_count():
    gates = read_gates([{"metric": "a", "max_increase": 1, "max_decrease": "2%"}, {"metric": "b", "max_decrease": 3}])
    assert [(g.metric, str(g)) for g in gates] == [
        ("a", "max_increase 1"), ("a", "max_decrease 2%"), ("b", "max_decrease 3"),
    ]  # fmt: skip


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_unknown_metric_ends_the_run_before_it_trains_or_compresses(tmp_path, epochs):
    module = Regression()
    start = [p.clone() for p in module.parameters()]
    callback = rounding(gate={"metric": "val/los", "max_increase": 1})
    with pytest.raises(ValueError, match="unknown metric 'val/los'; validation of this model measures val/mse"):
        quiet(tmp_path, callback, max_epochs=epochs).fit(module, Sums())
    assert all(torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
    assert not (tmp_path / "compressed.ckpt").exists()


def test_without_a_validation_loader_a_gate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing was measured, since there is no validation loader"):
        quiet(tmp_path, rounding(gate=LOSS), limit_val_batches=0).fit(Regression(), Sums())


def quantized(folder, limit, *callbacks, **options):
    """A callback, and what runs it: 2 bits raise this loss from .173 to .211."""
    torch.manual_seed(0)
    gate, module = {"metric": "val/mse", "max_increase": limit, "max_decrease": limit}, Regression()
    callback = CompressionCallback(QuantizationModifier(scheme="W2A16", group_size=-1), gate=[gate], load_best=False)
    trainer = quiet(folder, callback, *callbacks, **options)
    return callback, lambda **more: trainer.fit(module, Sums(), **more)


def test_a_run_fails_with_its_files_written_and_marked_and_again_when_it_is_resumed(tmp_path):
    callback, fit = quantized(tmp_path, 0.01, ModelCheckpoint(tmp_path / "kept", save_last=True))
    with pytest.raises(GateError, match=r"gate: val/mse .* -> .*max_increase 0.01: not held\. Checkpoint, export and"):
        fit()
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    metric, (entry, _) = summary["metric"]["val/mse"], summary["gate"]
    assert entry["before"] == metric["before"]
    assert entry["change"] == pytest.approx(metric["after"] - metric["before"])
    assert not entry["held"]
    assert origin_of(tmp_path / "compressed")["gate"] == [entry["text"]]
    assert (tmp_path / "compressed.ckpt").exists()
    assert callback.done
    exported = (tmp_path / "compressed" / "model.safetensors").stat().st_mtime_ns
    for limit in (0.02, 10):
        again, fit = quantized(tmp_path, limit)
        with pytest.raises(GateError, match="max_increase 0.02: not held") if limit < 1 else nullcontext():
            fit(ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert again.done
    assert (tmp_path / "compressed" / "model.safetensors").stat().st_mtime_ns == exported


def test_a_gate_that_holds_leaves_no_mark(tmp_path):
    callback, fit = quantized(tmp_path, 10)
    fit()
    assert [entry["held"] for entry in callback.run.facts["gate"]] == [True, True]
    assert "gate" not in origin_of(tmp_path / "compressed")


def test_a_trial_of_one_batch_is_not_judged(tmp_path):
    callback, fit = quantized(tmp_path, 0.01, fast_dev_run=True)
    fit()
    assert callback.done


def test_what_trains_is_compared_with_the_dense_model_before_its_window(tmp_path):
    torch.manual_seed(0)
    pruning = MagnitudePruningModifier(final_sparsity=0.9, start=2, end=3)
    callback = CompressionCallback(pruning, gate={"metric": "val/mse", "max_increase": 10})
    quiet(tmp_path, callback).fit(Regression(), Sums())
    (entry,), facts = callback.run.facts["gate"], callback.run.facts
    assert entry["dense_step"] == 2
    assert entry["before"] == facts["metric_dense"]["values"]["val/mse"] != facts["metric"]["val/mse"]["before"]
    assert entry["after"] == facts["metric"]["val/mse"]["after"]


def test_of_a_model_that_is_cut_at_set_up_a_gate_is_refused(tmp_path):
    pytest.importorskip("torch_pruning")
    cut = StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[8], ignore=["2"])
    with pytest.raises(ValueError, match="gate of 'val/mse': the model was cut at set-up"):
        quiet(tmp_path, CompressionCallback(cut, gate=LOSS)).fit(Regression(), Sums())


def test_all_ranks_fail_with_one_text(tmp_path):
    ddp = {"strategy": "ddp", "devices": 2}
    faults = run_two_ranks(lambda rank: quantized(tmp_path, 0.001, **ddp)[1](), tmp_path, 60)
    lines = [fault.strip().splitlines()[-1] for fault in faults]
    assert lines[0].startswith("lightning_compress.training.gate.GateError: gate: val/mse")
    assert lines[0] == lines[1]
