import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionCallback, GPTQModifier, QuantizationModifier
from tests.planning.test_copies import Stack


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Stack(3)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Data(LightningDataModule):
    def loader(self):
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(48, 8, generator=generator), torch.randn(48, 3, generator=generator))
        return DataLoader(data, batch_size=8)

    train_dataloader = val_dataloader = loader


def run(folder, module, callback, **arguments):
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", callbacks=[callback], **silent | arguments
    )
    trainer.fit(module, Data())
    return trainer


def test_only_the_plan(tmp_path, capsys):
    module = Regression()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, module, CompressionCallback(GPTQModifier(scheme="W4A16", group_size=8), plan=True))
    assert ended.value.code == 0
    assert module.steps == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert "plan: GPTQModifier on Stack" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    plan = json.loads((tmp_path / "report" / "plan.json").read_text())
    assert (plan["batches"], plan["blocks"], plan["unknown"]) == (6, 3, [])
    assert set(plan["seconds"]) == {"calibration", "export", "metric before", "metric after"}


def test_a_recipe_that_set_up_would_refuse(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, Regression(), CompressionCallback(GPTQModifier(scheme="W4A16", group_size=48), plan=True))
    assert ended.value.code == 1
    assert "group_size=48" in capsys.readouterr().out


def test_plan_and_fact(tmp_path, capsys):
    callback = CompressionCallback(QuantizationModifier(scheme="W8A8"), plan="compare")
    run(tmp_path, Regression(), callback)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("plan and fact")
    assert lines[start + 3].startswith("bytes of the export")
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["plan"]["bytes_after"] == pytest.approx(summary["model_bytes_after"], rel=0.7)  # a header of 1 KB


def test_half_precision_halves_the_bytes(tmp_path):
    sizes = []
    for precision in ("32-true", "bf16-true"):
        callback = CompressionCallback(QuantizationModifier(scheme="W8A8"), plan=True)
        with pytest.raises(SystemExit):
            run(tmp_path, Regression(), callback, precision=precision)
        sizes.append(json.loads((tmp_path / "report" / "plan.json").read_text())["bytes_before"])
    assert sizes[0] == 2 * sizes[1]


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="plan='maybe': expected True, False or 'compare'"):
        CompressionCallback(QuantizationModifier(scheme="W8A8"), plan="maybe")
