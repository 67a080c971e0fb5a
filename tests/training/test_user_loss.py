"""The loss of training_step in a survey: the weights that it leads to, and that the step leaves nothing behind."""

import copy

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_compress import CompressionCallback, GPTQModifier, compress
from tests.support.training_runs import Regression, Sums, quiet

W4 = {
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    }
}


class Logging(Regression):
    """It logs, counts, keeps its losses, updates a metric and a buffer."""

    def __init__(self):
        super().__init__()
        self.metric, self.losses, self.steps = MeanSquaredError(), [], 0
        self.register_buffer("mean", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        loss = self.error(batch)
        self.metric(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log_dict({"train/metric": self.metric}, prog_bar=True)
        self.logger.log_metrics({"train/direct": 1.0})
        self.losses.append(loss)
        self.steps += 1
        self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        return {"loss": loss, "rest": self.all_gather(batch[0])}


class Manual(Regression):
    """It optimizes by hand, in two parts."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        loss = self.error(batch)
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss)
        self.clip_gradients(optimizer, 1.0)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


class Sometimes(Regression):
    """It skips batches, and takes no number."""

    skipped = ()

    def training_step(self, batch):
        return None if int(batch[0][0, 0]) in self.skipped else self.error(batch)


class Data(Sums):
    def calibration_dataloader(self):
        return DataLoader(self.rows, 4)


def squared_error(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def fit(folder, module, **options):
    callback = CompressionCallback(GPTQModifier(**W4, objective="training_step"))
    trainer = quiet(folder, callback, max_epochs=0, **options)
    trainer.fit(module, Data())
    return trainer


def made(kind):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", [Regression, Logging, Manual, Sometimes])
def test_the_weights_are_those_of_the_loss(tmp_path, kind):
    module = made(kind)
    dense = copy.deepcopy(module.model)
    fit(tmp_path, module, logger=CSVLogger(tmp_path) if kind is Logging else False)
    compress(dense, GPTQModifier(**W4, objective="training_step"), Data().calibration_dataloader(), loss=squared_error)
    for one, other in zip(module.model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
        assert one.requires_grad


def test_a_model_in_bfloat16(tmp_path):
    module = made(Regression)
    dense = copy.deepcopy(module.model).bfloat16()
    fit(tmp_path, module, precision="bf16-true")
    batches = [tuple(part.bfloat16() for part in batch) for batch in Data().calibration_dataloader()]
    compress(dense, GPTQModifier(**W4, objective="training_step"), batches, loss=squared_error)
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), dense.parameters(), strict=True))


def test_the_labels_count():
    ends = []
    for sign in (1, -3):
        model = made(Regression).model
        batches = [(x, sign * y) for x, y in Data().calibration_dataloader()]
        compress(model, GPTQModifier(**W4, objective="training_step"), batches, loss=squared_error)
        ends.append(model[0].weight)
    assert not torch.equal(*ends)


def test_a_step_leaves_nothing_behind(tmp_path):
    module = made(Logging)
    losses = module.losses
    trainer = fit(tmp_path, module, logger=CSVLogger(tmp_path))
    assert module.losses is losses == []
    assert module.steps == 0
    assert float(module.mean) == 0
    assert module.metric.update_count == 0
    assert "log" not in vars(module)
    assert trainer.callback_metrics == {}
    assert isinstance(trainer.logger, CSVLogger)
    assert not any("train" in line for line in _lines(tmp_path))


def _lines(folder):
    return [line for path in folder.rglob("metrics.csv") for line in path.read_text().splitlines()]


def test_a_skipped_batch_keeps_equal_weights(tmp_path):
    """Batches 0 and 8, as their first numbers say; the loss of the others decides alone."""
    module = made(Sometimes)
    module.skipped = (0, 8)
    dense = copy.deepcopy(module.model)
    fit(tmp_path, module)

    def loss(model, batch):
        return None if int(batch[0][0, 0]) in (0, 8) else squared_error(model, batch)

    compress(dense, GPTQModifier(**W4, objective="training_step"), Data().calibration_dataloader(), loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), dense.parameters(), strict=True))
    module = made(Sometimes)
    module.skipped = range(100)
    with pytest.raises(ValueError, match="in no calibration batch did the loss have a gradient"):
        fit(tmp_path / "none", module)


def test_what_it_refuses(tmp_path):
    class Text(Regression):
        def training_step(self, batch, batch_idx):
            return "loss"

    class Rows(Regression):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"])

    class Iterating(Regression):
        def training_step(self, dataloader_iter):
            return self.error(next(dataloader_iter)[0])

    with pytest.raises(
        ValueError, match="Text.training_step returned a str for calibration batch 0; expected a tensor"
    ):
        fit(tmp_path, Text())
    with pytest.raises(TypeError) as error:
        fit(tmp_path, Rows())
    assert "This was Rows.training_step on calibration batch 0" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="Iterating.training_step takes dataloader_iter, and a survey has batches"):
        fit(tmp_path, Iterating())
