"""QAT on NVFP4 and MXFP4 in a real Trainer.fit: precisions, going on after a stop, two ranks; always to an export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_compress import CompressionCallback, GPTQModifier, QATModifier, load
from lightning_compress.quant.parametrization import fake_quantize_of
from lightning_compress.quant.record import Quantized
from tests.support.training_runs import Regression, Sums, quiet
from tests.test_qat_training import ByStep, Cut, X

SCHEMES = ["NVFP4", "MXFP4"]


def layers():
    """The layer "2" has groups of 16 and of 32 columns."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def module(kind=Regression):
    model = kind(torch.optim.Adam)
    model.model = layers()
    return model


def callback(scheme, **options):
    qat = QATModifier(scheme=scheme, targets=["2"], averaging_constant=0.5, **options)
    return CompressionCallback(qat, evaluate=False)


class Last(Callback):
    """Outputs and the weight after the last step, before anything is taken off."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            self.weight = pl_module.model[2].weight.clone()
            self.outputs = pl_module.model(X.to(pl_module.dtype))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_export_is_what_was_trained(tmp_path, scheme, precision):
    last, model = Last(), module()
    quiet(tmp_path, last, callback(scheme), precision=precision).fit(model, Sums())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert last.weight.dtype == dtype
    loaded = load(tmp_path / "compressed", layers().to(dtype), packed=False)
    assert torch.equal(loaded[2].weight, last.weight)
    with torch.no_grad():
        assert torch.equal(loaded(X.to(dtype)), last.outputs)


def test_training_goes_on_from_gptq_in_one_run(tmp_path):
    """The first scales are GPTQ's, with its global scale; the export is what was trained."""
    nvfp4, first, last, model = {"scheme": "NVFP4A16", "targets": ["2"], "start": 2}, {}, Last(), module()

    class Third(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                fake = fake_quantize_of(pl_module.model[2])
                first.update(given=fake.given, scale=fake.scale.clone(), global_scale=fake.global_scale.clone())

    both = CompressionCallback([GPTQModifier(scale_search="hessian", **nvfp4), QATModifier(**nvfp4)], evaluate=False)
    quiet(tmp_path, last, both, Third(), max_epochs=2).fit(model, Sums())
    assert [row.technique for row in both.ledger] == ["gptq", "qat"]
    assert first["given"]
    codes = (first["scale"] * first["global_scale"]).to(torch.float8_e4m3fn)
    assert torch.equal(codes.float() / first["global_scale"], first["scale"])
    loaded = load(tmp_path / "compressed", layers(), packed=False)
    assert torch.equal(loaded[2].weight, last.weight)
    halved = first["global_scale"] / Quantized.of(loaded[2]).global_scale
    assert halved.log2() in (0, 1)  # where the largest scale grew


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, scheme, gradient, stop):
    options = {"gradient": gradient, "observe_until": 5}
    quiet(tmp_path / "whole", callback(scheme, **options), max_epochs=2).fit(module(ByStep), Sums())
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    cut = quiet(tmp_path, callback(scheme, **options), keeping, Cut(stop + 1), max_epochs=2)
    with pytest.raises(KeyError, match="power cut"):
        cut.fit(module(ByStep), Sums())
    trainer = quiet(tmp_path / "resumed", callback(scheme, **options), max_epochs=2)
    trainer.fit(module(ByStep), Sums(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    whole, resumed = (load_file(tmp_path / n / "compressed" / "model.safetensors") for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert {"2.weight_packed", "2.weight_scale"} <= whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), resumed[name].view(torch.uint8)), name


RANKS = """
import sys, torch
from pathlib import Path
from lightning_compress.quant.record import Quantized
from lightning.pytorch.strategies import DDPStrategy
from tests.support.training_runs import Sums, quiet
from tests.test_qat_training_formats import callback, module

folder = Path(sys.argv[1])
model = module()
trainer = quiet(folder, callback(sys.argv[2], start=2), strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
                max_epochs=2)
trainer.fit(model, Sums(batches=8))
(layer, record), = Quantized.find(model).values()
extremes = [t for t in (record.global_scale, record.input_global_scale) if t is not None]
torch.save([record.scale, layer.weight.data, *extremes], folder / f"rank{trainer.global_rank}.pt")
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks_end_with_equal_scales_and_an_export(tmp_path, scheme):
    (tmp_path / "run.py").write_text(RANKS)
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), scheme]
    done = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert len(first) == (4 if scheme == "NVFP4" else 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loaded = load(tmp_path / "compressed", layers(), packed=False)
    assert torch.equal(loaded[2].weight, first[1])
    assert list(Quantized.find(loaded)) == ["2"]
