"""QAT in a real Trainer.fit: the export, the checkpoints, stopping and going on, and the strategies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_compress import (
    CompressionCallback,
    GPTQModifier,
    LearnedMaskModifier,
    MagnitudePruningModifier,
    MovementPruningModifier,
    QATModifier,
    load,
)
from lightning_compress.quant.record import Quantized
from tests.support.training_runs import Regression, Sums, quiet

STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def qat(inputs=None, **options):
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": inputs}
    return QATModifier(config_groups={"g": group}, **options)


def from_gptq(inputs=None, start=0, **options):
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": inputs}
    return [GPTQModifier(config_groups={"g": group}, start=start), qat(inputs, start=start, **options)]


def module(optimizer=torch.optim.Adam):
    torch.manual_seed(0)
    return Regression(optimizer)


class ByStep(Regression):
    """Its batches depend on the step alone: where a loader goes on is not this package's business."""

    def training_step(self, batch, batch_idx):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.global_step))
        return self.error((x, x.sum(1, keepdim=True)))


class Cut(Callback):
    """What a power cut does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyError("power cut")


class Watch(Callback):
    """Outputs as each batch begins."""

    def __init__(self):
        self.outputs, self.latents = [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        with torch.no_grad():
            self.outputs.append(pl_module(X))
            layer = pl_module.model[0]
            parametrized = hasattr(layer, "parametrizations")
            weight = layer.parametrizations.weight.original if parametrized else layer.weight
            self.latents.append(weight.detach().clone())


class LastOutputs(Callback):
    """What the model says in evaluation mode after the last step, before anything is taken off."""

    def on_train_end(self, trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            self.outputs = pl_module(X)
        pl_module.train()


@pytest.mark.parametrize("options", [{}, {"gradient": "ste"}, {"inputs": STATIC, "averaging_constant": 0.5}], ids=str)
def test_the_export_computes_what_was_trained(tmp_path, options):
    last, model = LastOutputs(), module()
    quiet(tmp_path, last, CompressionCallback(qat(**options))).fit(model, Sums())
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), packed=False)
    with torch.no_grad():
        assert torch.equal(loaded(X), last.outputs)
        assert torch.equal(model(X), last.outputs)
    assert list(Quantized.find(loaded)) == ["0", "2"]


def test_checkpoints_load_without_this_package(tmp_path):
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    quiet(tmp_path, CompressionCallback(qat()), keeping).fit(module(), Sums())
    for name in ("last", "compressed"):
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert list(state) == list(module().state_dict())
    plain = Regression.load_from_checkpoint(tmp_path / "compressed.ckpt")
    run = f"""
import sys, torch
sys.modules["lightning_compress"] = None
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
state = torch.load({str(tmp_path / "compressed.ckpt")!r}, weights_only=True)["state_dict"]
model.load_state_dict({{k.removeprefix("model."): v for k, v in state.items()}})
print(model(torch.ones(1, 8)).item())
"""
    printed = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        assert float(printed) == pytest.approx(plain.cpu()(torch.ones(1, 8)).item(), rel=1e-6)


def test_the_best_checkpoint_is_the_compressed_one(tmp_path):
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    model = module()
    trainer = quiet(tmp_path, CompressionCallback(qat()), keeping, max_epochs=2)
    trainer.fit(model, Sums())
    compressed = model(X)
    trainer.test(model, Sums(), ckpt_path="best", verbose=False)
    assert torch.equal(model(X), compressed)


def test_the_best_weights_come_with_their_scales(tmp_path):
    """The first epoch is the best: what is exported is the model of then, scales included."""

    class Worse(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/mse", float(self.trainer.current_epoch))

    class After(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.current_epoch == 0 and not trainer.sanity_checking:
                with torch.no_grad():
                    self.outputs = pl_module(X)

    torch.manual_seed(0)
    model, after = Worse(torch.optim.Adam), After()
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    quiet(tmp_path, CompressionCallback(qat()), keeping, after, max_epochs=3).fit(model, Sums())
    with torch.no_grad():
        assert torch.equal(model(X), after.outputs)


def test_best_weights_from_before_the_start_are_rounded_with_a_warning(tmp_path):
    class Worse(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/mse", float(self.trainer.current_epoch))

    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    model = Worse(torch.optim.Adam)
    with pytest.warns(UserWarning, match="the best checkpoint was saved before start=6.0.*set load_best=False"):
        quiet(tmp_path, CompressionCallback(qat(start=6)), keeping, max_epochs=3).fit(model, Sums())
    assert list(Quantized.find(model)) == ["model.0", "model.2"]


@pytest.mark.parametrize("start", [0, 3])
def test_one_run_quantizes_first_and_trains_then(tmp_path, start):
    """Until ``start`` it is the plain run; then GPTQ, and training on the values that it rounded."""
    before, after, plain, last = Watch(), Watch(), Watch(), LastOutputs()
    torch.manual_seed(0)
    quiet(tmp_path / "plain", plain, max_epochs=2).fit(ByStep(torch.optim.Adam), Sums())
    torch.manual_seed(0)
    model, callback = ByStep(torch.optim.Adam), CompressionCallback(from_gptq(start=start))
    quiet(tmp_path, before, callback, after, last, max_epochs=2).fit(model, Sums())
    for step in range(start + 1):
        assert torch.equal(before.outputs[step], plain.outputs[step])  # random state and data as without it
    assert torch.equal(after.outputs[start - 1], plain.outputs[start - 1]) or not start
    quantized = callback.ledger.rows[0]
    assert (quantized.technique, quantized.module) == ("gptq", "0")
    assert quantized.tokens > 0
    assert not torch.equal(after.outputs[start], before.outputs[start])
    assert not torch.equal(after.latents[start], before.latents[start])
    assert not torch.equal(after.latents[start + 1], after.latents[start])  # and the optimizer moves them
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), packed=False)
    with torch.no_grad():
        assert torch.equal(loaded(X), last.outputs)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["calibration_batches"] > 0


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_run_from_gptq_ends_with_the_same_bits(tmp_path, stop):
    def model(seed=0):
        torch.manual_seed(seed)
        return ByStep(torch.optim.Adam)

    data = Sums()
    quiet(tmp_path / "whole", CompressionCallback(from_gptq(STATIC, start=3)), max_epochs=2).fit(model(), data)
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    callback = CompressionCallback(from_gptq(STATIC, start=3))
    with pytest.raises(KeyError, match="power cut"):
        quiet(tmp_path, callback, keeping, Cut(stop + 1), max_epochs=2).fit(model(), data)
    again = CompressionCallback(from_gptq(STATIC, start=3))
    trainer = quiet(tmp_path / "resumed", again, max_epochs=2)
    trainer.fit(model(seed=99), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [row.technique for row in again.ledger.rows].count("gptq") == 2  # never a second time
    whole, resumed = (load_file(tmp_path / n / "compressed" / "model.safetensors") for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize(
    "options", [{"inputs": STATIC, "observe_until": 5}, {"start": 5, "end": 7}, {"gradient": "ste"}], ids=str
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop, options):
    def recipe():
        return [MagnitudePruningModifier(start=1, end=6, final_sparsity=0.5), qat(**options)]

    def model(seed=0):
        torch.manual_seed(seed)
        return ByStep(torch.optim.Adam)

    data = Sums()
    quiet(tmp_path / "whole", CompressionCallback(recipe()), max_epochs=2).fit(model(), data)
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.raises(KeyError, match="power cut"):
        quiet(tmp_path, CompressionCallback(recipe()), keeping, Cut(stop + 1), max_epochs=2).fit(model(), data)
    again = CompressionCallback(recipe())
    trainer = quiet(tmp_path / "resumed", again, max_epochs=2)
    trainer.fit(model(seed=99), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.clock.global_step == 8
    whole, resumed = (load_file(tmp_path / n / "compressed" / "model.safetensors") for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    first = module()
    quiet(tmp_path, CompressionCallback(qat())).fit(first, Sums())
    before = (tmp_path / "compressed" / "model.safetensors").stat().st_mtime_ns
    again = Regression(torch.optim.Adam)
    quiet(tmp_path, CompressionCallback(qat())).fit(again, Sums(), ckpt_path=tmp_path / "compressed.ckpt")
    assert (tmp_path / "compressed" / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(again(X), first(X))
    assert list(again.state_dict()) == list(first.state_dict())


def test_a_run_that_was_cut_short_is_tested_with_its_own_scales(tmp_path):
    class Third(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                with torch.no_grad():
                    self.outputs = pl_module(X)

    third, model = Third(), module()
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    trainer = quiet(tmp_path, CompressionCallback(qat()), third, keeping, Cut(4), max_epochs=2)
    with pytest.raises(KeyError, match="power cut"):
        trainer.fit(model, Sums())
    trainer.test(model, Sums(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(model(X), third.outputs)


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str
)
def test_other_ways_to_train(tmp_path, options):
    last, model = LastOutputs(), module()
    callback = CompressionCallback(qat(), evaluate=False)
    kept = [] if options.get("precision") == "bf16-true" else [last]
    quiet(tmp_path, *kept, callback, **options).fit(model, Sums())
    assert list(Quantized.find(model)) == ["model.0", "model.2"]
    if kept and "precision" not in options:
        assert torch.equal(model(X), last.outputs)


def test_bf16_autocast_learns_activation_scales_and_exports_what_it_trained(tmp_path):
    """Under autocast the layers compute in bf16 with the very weights of the export; scales are float32."""
    model, before = module(), {}
    options = {"averaging_constant": 0.5, "observe_until": 2, "learn_activations": True}

    class Weights(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                before.update({name: pl_module.get_submodule(name).weight.clone() for name in ("model.0", "model.2")})

    callback = CompressionCallback(qat(STATIC, **options), evaluate=False)
    quiet(tmp_path, Weights(), callback, precision="bf16-mixed").fit(model, Sums())
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), packed=False)
    for name, weight in before.items():
        assert weight.dtype == torch.float32
        assert torch.equal(loaded.get_submodule(name.removeprefix("model.")).weight, weight)


@pytest.mark.parametrize("recipe", [qat, lambda: from_gptq(start=2)], ids=["qat", "from gptq"])
def test_a_compiled_model(tmp_path, recipe):
    model = module()
    model.model = torch.compile(model.model, backend="eager")
    last = LastOutputs()
    quiet(tmp_path, last, CompressionCallback(recipe(), evaluate=False)).fit(model, Sums())
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), packed=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), last.outputs, rtol=1e-6, atol=1e-6)


def test_weight_averaging_is_refused(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(ValueError, match="pairs tensors by position"):
        quiet(tmp_path, EMAWeightAveraging(), CompressionCallback(qat())).fit(module(), Sums())


RANKS = """
import sys, torch
from pathlib import Path
from lightning_compress import CompressionCallback
from lightning_compress.quant.record import Quantized
from lightning.pytorch.strategies import DDPStrategy
from tests.test_qat_training import STATIC, X, from_gptq, module, qat
from tests.support.training_runs import Sums, quiet

folder = Path(sys.argv[1])
model, data = module(), Sums(batches=8)
callback = CompressionCallback({"qat": qat, "from_gptq": from_gptq}[sys.argv[2]](
    inputs=STATIC, start=2, averaging_constant=0.5))
trainer = quiet(folder, callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2, max_epochs=2)
trainer.fit(model, data)
records = Quantized.find(model).items()
scales = {name: (record.scale, record.input_scale, layer.weight.data) for name, (layer, record) in records}
torch.save(scales, folder / f"rank{trainer.global_rank}.pt")
"""


@pytest.mark.parametrize("recipe", ["qat", "from_gptq"])
def test_two_ranks_end_with_equal_scales(tmp_path, recipe):
    (tmp_path / "run.py").write_text(RANKS)
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), recipe]
    done = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert list(first) == ["model.0", "model.2"]
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


@pytest.mark.parametrize(
    "modifier",
    [
        lambda: qat(),
        lambda: MagnitudePruningModifier(final_sparsity=0.5),
        lambda: MovementPruningModifier(final_sparsity=0.5, unit="fraction", end=0.9),
        lambda: LearnedMaskModifier(unit="fraction", end=0.9),
    ],
    ids=["qat", "magnitude", "movement", "learned mask"],
)
def test_the_model_is_a_single_layer(tmp_path, modifier):
    """Training on a parametrized layer does not change which module the callback takes for the model."""
    model = module()
    model.model = nn.Linear(8, 1)
    trainer = quiet(tmp_path, CompressionCallback({"m": modifier()}, evaluate=False))
    trainer.fit(model, Sums())
    weight = model.model.weight.detach()
    codes = Quantized.of(model.model)
    assert (
        (weight == 0).sum() == 4 if codes is None else len((weight.view(2, 4) / codes.scale.view(2, 1)).unique()) <= 16
    )
    assert (tmp_path / "compressed" / "model.safetensors").is_file()
