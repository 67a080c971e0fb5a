"""An app in the style of the lightning-hydra-template, whose checkpoints pickle the network that is compressed."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import CompressionCallback
from tests.support.strategy_runs import TEMPLATE as RECIPES
from tests.support.template_app import DenseNet, DigitsData, DigitsModule
from tests.support.template_reader import fixed_batch
from tests.support.training_runs import quiet

ACTIVATIONS = ("w8a8", "qat_w8a8")  # quantized inputs are not part of a checkpoint, as docs/export.md says


@pytest.fixture(scope="module")
def read_elsewhere():
    """A function from the path of a checkpoint to the logits of what a process without this package loads from it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-m", "tests.support.template_reader"], cwd=root, **pipes) as reader:

        def read(path):
            print(path, file=reader.stdin, flush=True)
            logits = json.loads(reader.stdout.readline())
            assert isinstance(logits, list), logits
            return torch.tensor(logits)

        yield read
        reader.stdin.close()


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_runs_in_a_template_app(tmp_path, read_elsewhere, kind):
    torch.manual_seed(0)
    module, data = DigitsModule(DenseNet()), DigitsData()
    kept = ModelCheckpoint(tmp_path, filename="best", monitor="val/acc", mode="max", save_last=True)
    trainer = quiet(tmp_path, CompressionCallback(RECIPES[kind](), calibration_batches=2), kept, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    compressed = tmp_path / "compressed.ckpt"
    assert module.hparams.net is module.net  # what is stored is a copy
    tested = trainer.test(module, data, ckpt_path="best", weights_only=False, verbose=False)[0]["test/acc"]

    logits = read_elsewhere(compressed)
    net = module.net.eval()
    if kind in ACTIVATIONS:
        net = DenseNet().eval()
        net.load_state_dict(module.net.state_dict())
    with torch.no_grad():
        assert torch.equal(logits, net(fixed_batch()))
    assert 0 <= tested <= 1

    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)  # in the midst of training
    assert torch.equal(read_elsewhere(tmp_path / "last.ckpt"), stored["hyper_parameters"]["net"].eval()(fixed_batch()))
    assert stored["hyper_parameters"]["net"].state_dict().keys() == module.net.state_dict().keys()
    for key, tensor in stored["hyper_parameters"]["net"].state_dict().items():
        assert tensor.data_ptr() == stored["state_dict"][f"net.{key}"].data_ptr()  # stored once
