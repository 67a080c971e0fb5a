"""Shapes that shrink in a Trainer's run: checkpoints fit again, exports load in transformers, tests find the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    CompressionCallback,
    DepthPruningModifier,
    DistillationModifier,
    GPTQModifier,
    StructuredPruningModifier,
    load,
    save,
)
from lightning_compress.structure.surgery import record_of
from tests.support.structure_runs import images, llama, residuals, tokens
from tests.support.training_runs import Regression, Sums, best, quiet


def channels(**arguments):
    return StructuredPruningModifier(**{"dimension": "channels", "ratio": 0.5, "start": 2, **arguments})


class Language(LightningModule):
    """A small Llama that learns to repeat."""

    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Vision(LightningModule):
    """Residuals, BatchNorm, momentum."""

    def __init__(self):
        super().__init__()
        self.model = residuals()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def texts():
    return DataLoader(TensorDataset(tokens(count=12)["input_ids"]), 4)


def pictures():
    return DataLoader(TensorDataset(*images(count=32)), 8)


def test_a_cnn_shrinks_and_trains_on(tmp_path):
    module = Vision()
    trainer = quiet(tmp_path, CompressionCallback(channels()), max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, pictures())
    assert module.model.stem.weight.shape == (4, 1, 3, 3)
    assert module.model.head.in_features == 16
    (optimizer,) = trainer.optimizers
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(module.parameters())
    assert all(entry["momentum_buffer"].shape == p.shape for p, entry in optimizer.state.items())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    moved = quiet(tmp_path / "again", max_epochs=1, enable_checkpointing=False)
    moved.fit(module, pictures())  # without the callback: an ordinary model


def test_the_compressed_checkpoint_is_tested_here_and_in_a_new_trainer(tmp_path):
    module = Regression()
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    trainer = quiet(tmp_path, CompressionCallback(channels()), best, max_epochs=2)
    trainer.fit(module, Sums())
    assert module.model[0].out_features == 4
    (here,) = trainer.test(module, Sums(), ckpt_path="best", verbose=False)
    fresh = Regression()
    (there,) = quiet(tmp_path, CompressionCallback(channels())).test(
        fresh, Sums(), ckpt_path=tmp_path / "compressed.ckpt", verbose=False, weights_only=True
    )
    assert fresh.model[0].out_features == 4
    assert there == here


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_saved_after_fit_carries_its_shapes(tmp_path, weights_only):
    module, callback = Regression(), CompressionCallback(channels())
    trainer = quiet(tmp_path, callback)
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True, save_weights_only=weights_only)
    trainer = quiet(tmp_path, callback, keeping, max_epochs=1)
    trainer.fit(module, Sums())
    path = tmp_path / "kept" / "last.ckpt"
    if not weights_only:
        path = tmp_path / "later.ckpt"
        trainer.save_checkpoint(path)
    fresh = Regression()
    quiet(tmp_path, CompressionCallback(channels())).test(fresh, Sums(), ckpt_path=path, verbose=False)
    assert fresh.model[0].out_features == 4


def test_a_dense_checkpoint_does_not_fit_the_small_model_any_more(tmp_path):
    module = Regression()
    keeping = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet(tmp_path, CompressionCallback(channels()), keeping)
    trainer.fit(module, Sums())
    with pytest.raises(ValueError, match="saved when 0 of the 1 cuts .* had been made"):
        trainer.test(module, Sums(), ckpt_path=tmp_path / "kept" / "step=1.ckpt", verbose=False)
    fresh = Regression()
    quiet(tmp_path, CompressionCallback(channels())).test(
        fresh, Sums(), ckpt_path=tmp_path / "kept" / "step=1.ckpt", verbose=False
    )
    assert fresh.model[0].out_features == 8


def test_a_best_checkpoint_of_other_shapes_gives_way_to_the_last_weights(tmp_path):
    class Worsens(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/mse", torch.tensor(float(self.trainer.global_step)))

    module = Worsens()
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    trainer = quiet(tmp_path, CompressionCallback(channels(start=5)), best, max_epochs=2)
    with pytest.warns(UserWarning, match="before the model had shrunk to its present shapes; the last weights"):
        trainer.fit(module, Sums())
    assert module.model[0].out_features == 4
    trainer.test(module, Sums(), ckpt_path="best", verbose=False)


def test_a_model_that_was_shrunk_in_another_way_is_refused(tmp_path):
    quiet(tmp_path, CompressionCallback(channels())).fit(Regression(), Sums())
    other = CompressionCallback(channels(start=0, ratio=0.25, input_shape=[8]), allow_recipe_change=True)
    with pytest.raises(ValueError, match="was shrunk in another way than the model that was saved"):
        quiet(tmp_path, other).fit(Regression(), Sums(), ckpt_path=tmp_path / "compressed.ckpt")


def test_averaging_is_refused(tmp_path):
    trainer = quiet(tmp_path, WeightAveraging(), CompressionCallback(channels()))
    with pytest.raises(ValueError, match="WeightAveraging averages weights of one shape"):
        trainer.fit(Regression(), Sums())


def test_distillation_learns_from_the_dense_model_and_refuses_the_small_one(tmp_path):
    distilling = DistillationModifier(weight=0.5)
    module = Language()
    shrinking = StructuredPruningModifier(ratio=0.5, start=0)
    quiet(tmp_path, CompressionCallback([distilling, shrinking])).fit(module, texts())
    assert module.model.config.intermediate_size == 24
    swapped = [StructuredPruningModifier(ratio=0.5, start=0), DistillationModifier(weight=0.5)]
    with pytest.raises(ValueError, match="let DistillationModifier stand before it"):
        quiet(tmp_path / "swapped", CompressionCallback(swapped)).fit(Language(), texts())


class PowerCut(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            raise KeyError("power cut")


@pytest.mark.parametrize("start", [0, 2, 5], ids=["at set-up", "before the cut", "after the cut"])
def test_a_run_that_lost_blocks_resumes_with_the_same_bits(tmp_path, start):
    def run(folder, *callbacks, **options):
        where = {"layers": [1]} if start == 0 else {"count": 1}
        module, callback = Language(), CompressionCallback(DepthPruningModifier(start=start, **where))
        keeping = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=1)
        quiet(folder, callback, keeping, *callbacks, max_epochs=2).fit(module, texts(), **options)
        assert len(module.model.model.layers) == 2
        return module.model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "cut", PowerCut())
    resumed = run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "kept" / "last.ckpt", weights_only=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize(("quantize", "importance"), [(False, "taylor"), (True, "activation")], ids=["dense", "gptq"])
def test_plain_transformers_loads_the_small_model_in_a_clean_process(tmp_path, quantize, importance):
    module = Language()
    modifiers = [
        DistillationModifier(weight=0.5),
        StructuredPruningModifier(ratio=0.25, start=1, end=5, importance=importance, round_to=4),
        StructuredPruningModifier(dimension="heads", ratio=0.5, start=0),
        DepthPruningModifier(count=1, start=3),
        *([GPTQModifier(scheme="W8A16", group_size=4, ignore=["re:.*lm_head"])] if quantize else []),
    ]
    quiet(tmp_path, CompressionCallback(modifiers), max_epochs=2).fit(module, texts(), texts())
    folder = tmp_path / "compressed"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    assert [config[size] for size in sizes] == [36, 4, 2, 4, 32]
    torch.save(tokens(), tmp_path / "in.pt")
    command = [sys.executable, "-c", RELOAD, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    with torch.no_grad():
        assert_close(torch.load(tmp_path / "out.pt"), module.model.eval()(**tokens()).logits)


@pytest.mark.parametrize("quantize", [False, True])
def test_an_export_of_any_network_is_loaded_into_the_dense_one(tmp_path, quantize):
    module = Vision()
    modifiers = [channels(), *([GPTQModifier(scheme="W8A16", group_size=4, targets=["head"])] if quantize else [])]
    quiet(tmp_path, CompressionCallback(modifiers)).fit(module, pictures())
    loaded = load(tmp_path / "compressed", residuals(seed=1))
    x, _ = images(seed=5)
    assert loaded.stem.weight.shape == (4, 1, 3, 3)
    assert_close(loaded(x), module.model.eval()(x))
    save(loaded, tmp_path / "again")
    assert_close(load(tmp_path / "again", residuals(seed=2))(x), loaded(x))


DDP = """
import sys
from tests.test_callback_structured import *
module = Language()
shrinking = StructuredPruningModifier(ratio=0.25, start=0)
trainer = quiet(sys.argv[1], CompressionCallback(shrinking), strategy="ddp", devices=2)
trainer.fit(module, texts())
assert module.model.model.layers[0].mlp.gate_proj.weight.shape == (36, 32)
"""


@pytest.mark.slow  # each process imports transformers anew
def test_two_processes_train_a_model_that_shrank_at_set_up(tmp_path):
    (tmp_path / "run.py").write_text(DDP)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    fresh = Language()
    quiet(tmp_path, CompressionCallback(StructuredPruningModifier(ratio=0.25, start=0))).test(
        fresh, texts(), ckpt_path=tmp_path / "compressed.ckpt", verbose=False
    )
    assert len(record_of(fresh.model)) == 1
    assert fresh.model.config.intermediate_size == 36
    assert (tmp_path / "compressed" / "config.json").exists()


def test_the_main_process_of_forked_workers_keeps_the_dense_model_and_tests_the_small_one(tmp_path):
    module, kept = Regression(), best(tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = CompressionCallback(channels(start=0, input_shape=[8]))
    trainer = quiet(tmp_path, callback, kept, strategy="ddp_fork", devices=2)
    trainer.fit(module, Sums())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    compressed = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    assert compressed["model.0.weight"].shape[0] < before["model.0.weight"].shape[0]
    assert kept.best_model_path == str(tmp_path / "compressed.ckpt")
    tested = trainer.test(module, Sums(), ckpt_path="best", verbose=False)[0]["test/mse"]
    x, y = (column[::2] for column in Sums().rows.tensors)  # the share of rank 0, which speaks for all
    small = load(tmp_path / "compressed", Regression().model)
    assert tested == pytest.approx(nn.functional.mse_loss(small(x), y).item(), rel=1e-5)
