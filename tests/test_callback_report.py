"""What the report's headline means: sizes before any cut, bytes as written, the metric of the dense model."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    CompressionCallback,
    LearnedMaskModifier,
    MagnitudePruningModifier,
    QATModifier,
    QuantizationModifier,
)
from lightning_compress import StructuredPruningModifier as Structured

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(X, X.sum(1, keepdim=True)), 8)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss(self, batch):
        return (self.model(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


def fit(folder: Path, *modifiers, precision="32-true") -> tuple[Net, dict]:
    torch.manual_seed(0)
    module = Net()
    callback = CompressionCallback(list(modifiers))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[callback], precision=precision,
    )  # fmt: skip
    trainer.fit(module, DATA, DATA)
    return module, json.loads((folder / "report" / "summary.json").read_text())


def test_what_training_prunes_is_compared_with_the_dense_model(tmp_path):
    _, summary = fit(tmp_path, MagnitudePruningModifier(final_sparsity=0.9, start=4, end=6))
    assert summary["metric_dense"]["step"] == 4
    assert summary["metric_dense"]["values"]["val/loss"] != pytest.approx(summary["metric"]["val/loss"]["after"])
    # the weights of step 4 were measured before any of them was masked: the same loss as of the dense model there
    torch.manual_seed(0)
    dense = Net()
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path / "dense",
    )  # fmt: skip
    trainer.fit(dense, DATA)
    with torch.no_grad():
        expected = float((dense.model(X) - X.sum(1, keepdim=True)).square().mean())
    assert summary["metric_dense"]["values"]["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_measuring_the_dense_model_changes_no_bit_of_training(tmp_path):
    pruner = {"final_sparsity": 0.5, "start": 4, "end": 6}
    measured, _ = fit(tmp_path / "measured", MagnitudePruningModifier(**pruner))
    torch.manual_seed(0)
    other = Net()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path / "not",
        callbacks=[CompressionCallback(MagnitudePruningModifier(**pruner), evaluate=False)],
    )  # fmt: skip
    trainer.fit(other, DATA, DATA)
    assert all(torch.equal(a, b) for a, b in zip(measured.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("start", [0, 4], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        lambda start: QATModifier(targets=["Linear"], scheme="W2A16", group_size=16, start=start),
        lambda start: QATModifier(targets=["Linear"], scheme="W8A8", start=start, gradient="lsq"),
        lambda start: LearnedMaskModifier(targets=["0"], start=start, end=6),
    ],
    ids=["qat", "qat with inputs", "learned mask"],
)
def test_the_dense_model_is_measured_without_what_acts_since_set_up(tmp_path, kind, start):
    _, summary = fit(tmp_path, kind(start))
    _, other = fit(tmp_path / "dense", MagnitudePruningModifier(final_sparsity=0.9, start=start, end=6))
    assert summary["metric_dense"] == other["metric_dense"]
    assert summary["metric_dense"]["step"] == start


def test_of_a_model_that_was_cut_at_set_up_no_dense_metric_is_told(tmp_path):
    pytest.importorskip("torch_pruning")
    cut = Structured(dimension="channels", ratio=0.5, start=0, input_shape=[16], ignore=["2"])
    _, summary = fit(tmp_path, cut)
    assert "metric_dense" not in summary
    assert "val/loss" in summary["metric"]


def test_what_acts_after_training_needs_no_third_measurement(tmp_path):
    _, summary = fit(tmp_path, QuantizationModifier(scheme="W8A16", group_size=-1))
    assert "metric_dense" not in summary


def test_the_size_before_is_that_before_the_cut_and_the_size_after_that_of_the_files(tmp_path):
    pytest.importorskip("torch_pruning")
    cut = Structured(dimension="channels", ratio=0.5, start=0, input_shape=[16], ignore=["2"])
    module, summary = fit(tmp_path, cut)
    assert summary["model_bytes_before"] == 4 * (16 * 32 + 32 + 32 + 1)
    assert module.model[0].out_features == 16
    files = list((tmp_path / "compressed").glob("*.safetensors"))
    assert summary["model_bytes_after"] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_run_without_a_metric_looks_for_one_once_at_most(tmp_path, monkeypatch, evaluate):
    calls = []
    monkeypatch.setattr(
        "lightning_compress.training.post_training.PostTraining.measure_dense", lambda self: calls.append(1)
    )
    callback = CompressionCallback(MagnitudePruningModifier(final_sparsity=0.5, start=2, end=6), evaluate=evaluate)
    L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=tmp_path, callbacks=[callback],
    ).fit(Net(), DATA)  # fmt: skip
    assert len(calls) == evaluate


def test_the_size_before_is_that_in_the_precision_that_trains(tmp_path):
    """The Trainer converts after setup: halved weights must not look like compression."""
    _, summary = fit(tmp_path, QuantizationModifier(scheme="W8A16", group_size=-1), precision="bf16-true")
    assert summary["model_bytes_before"] == 2 * (16 * 32 + 32 + 32 + 1)
