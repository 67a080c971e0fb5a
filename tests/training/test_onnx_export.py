import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionCallback, QATModifier, QuantizationModifier
from tests.support.training_runs import quiet

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)

STATIC = {
    "all": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    }
}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, callback):
    data = TensorDataset(torch.randn(32, 8), torch.randint(2, (32,)))
    quiet(folder, callback, enable_checkpointing=False).fit(Module(), DataLoader(data, 8))


@pytest.mark.parametrize("formats", [["compressed_tensors", "onnx"], "onnx"])
def test_a_run_writes_the_file_and_its_facts(tmp_path, formats):
    """A recipe without calibration too: the call that is traced is that of a training batch."""
    fit(tmp_path, CompressionCallback(QATModifier(config_groups=STATIC), export=formats, evaluate=False))
    facts = json.loads((tmp_path / "report" / "summary.json").read_text())
    folder = tmp_path / "compressed_onnx"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "recipe.yaml", "export_manifest.json"}
    assert facts["onnx"]["file"] == str(folder / "model.onnx")
    assert facts["onnx"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert facts["onnx"]["difference"] < 0.02
    assert (tmp_path / "compressed").is_dir() == (formats != "onnx")
    assert facts["export_dir"] == str(folder if formats == "onnx" else tmp_path / "compressed")
    with pytest.raises(ValueError, match="exists and is not empty"):
        fit(tmp_path, CompressionCallback(QATModifier(config_groups=STATIC), export=formats, evaluate=False))


def test_what_onnx_cannot_express_is_refused_before_training(tmp_path):
    callback = CompressionCallback(QuantizationModifier(scheme="W8A8"), export=["onnx"], evaluate=False)
    with pytest.raises(ValueError, match="'0' cannot be written as ONNX: its inputs have scales by token"):
        fit(tmp_path, callback)
    assert not (tmp_path / "compressed_onnx").exists()
    with pytest.raises(ValueError, match="export='pt' is not a format"):
        CompressionCallback(QuantizationModifier(scheme="W8A8"), export="pt")
