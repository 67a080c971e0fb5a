"""QAT of experts in one tensor: each is trained on its own grid, and exported as other quantizers export it."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback, QATModifier, QuantizationModifier, compress, load, save
from lightning_compress.core import Lifecycle, State
from lightning_compress.layers.expert_slices import set_aside
from lightning_compress.modifiers import qat
from lightning_compress.quant.parametrization import fake_quantize_of
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES
from tests.support.training_runs import quiet
from tests.test_qat_training import Cut

IGNORE = ["lm_head", "re:.*mlp.gate$"]
BLOCKS = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [12, 24]}}
W4 = {"scheme": "W4A16", "group_size": 16}


def on_experts(**options):
    return QATModifier(**{"ignore": IGNORE, "averaging_constant": 0.5} | W4 | options)


class Language(LightningModule):
    def __init__(self, name="mixtral"):
        super().__init__()
        self.model = ARCHITECTURES[name].build()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self):
        return DataLoader(torch.cat([b["input_ids"] for b in ARCHITECTURES["mixtral"].batches(8)]), batch_size=4)


def stepped(model, modifier, batches, steps=3):
    """The lifecycle after some steps by hand, with the averages of static scales taken after each."""
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State(model=model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step], labels=batches[step]["input_ids"]).loss.backward()
        optimizer.step()
        modifier._take_batch()
        modifier._widen_global_scales()
    return lifecycle


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("mixtral", "W4A16"), ("mixtral", "NVFP4"), ("mixtral", BLOCKS), ("qwen3_moe", "MXFP4"), ("qwen3_moe", "FP8"),
     ("deepseek_v3", "W8A8")],
    ids=str,
)  # fmt: skip
def test_what_was_trained_is_what_a_reader_computes(name, scheme, gradient, tmp_path):
    architecture = ARCHITECTURES[name]
    model, batches = architecture.build(), architecture.batches()
    keys = list(model.state_dict())
    sized = {"group_size": 16} if scheme == "W4A16" else {"group_size": None}
    lifecycle = stepped(model, on_experts(scheme=scheme, gradient=gradient, **sized), batches)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        before, state = model(**batches[3]).logits, State(model=model)
        lifecycle.finalize(state)
        after = model(**batches[3]).logits
        assert torch.equal(before, after)
        assert list(model.state_dict()) == keys
        save(model, tmp_path)
        assert torch.equal(load(tmp_path, packed=False)(**batches[3]).logits, after)
    layers = {key.rpartition(".experts.")[0] for key in keys if key.endswith(".experts.gate_up_proj")}
    quantized = {name for name in Quantized.find(model) if ".experts." in name}
    projections = ("gate_proj", "up_proj", "down_proj")
    every = {f"{layer}.experts.{e}.{part}" for layer in layers for e in range(4) for part in projections}
    unseen = {row.module for row in state.ledger if row.flags}
    assert quantized == every - unseen
    assert not unseen or scheme == "FP8"  # whose static scales need a token


def test_it_begins_at_rounding_to_nearest_and_moves_every_expert():
    rounded, model = ARCHITECTURES["mixtral"].build(), ARCHITECTURES["mixtral"].build()
    compress(rounded, QuantizationModifier(ignore=IGNORE, **W4))
    lifecycle = Lifecycle([on_experts()])
    lifecycle.initialize(State(model=model))
    experts = [linear for module in model.modules() for linear in set_aside(module)]
    assert len(experts) == 2 * 4 * 3
    for linear in experts:
        assert fake_quantize_of(linear).scale.shape == (linear.out_features, linear.in_features // 16)
    batch = ARCHITECTURES["mixtral"].batches()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, rounded(**batch).logits)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for linear in experts:
        assert (linear.slice_of(linear.whole.grad) != 0).any()
        assert (fake_quantize_of(linear).change.grad != 0).any()


def test_training_goes_on_from_experts_that_are_quantized_already():
    model, batch = ARCHITECTURES["mixtral"].build(), ARCHITECTURES["mixtral"].batches()[0]
    compress(model, QuantizationModifier(ignore=IGNORE, scale_search="mse", **W4))
    records = {name: record.scale for name, (_, record) in Quantized.find(model).items()}
    with torch.no_grad():
        expected = model(**batch).logits
        lifecycle = Lifecycle([on_experts()])
        lifecycle.initialize(State(model=model))
        assert not Quantized.find(model)
        assert torch.equal(model(**batch).logits, expected)
        lifecycle.finalize(State(model=model))
        assert torch.equal(model(**batch).logits, expected)
    assert records.keys() == Quantized.find(model).keys()
    assert all(torch.equal(record.scale, records[name]) for name, (_, record) in Quantized.find(model).items())


def test_experts_that_are_left_out_stay_in_one_tensor():
    model = ARCHITECTURES["mixtral"].build()
    lifecycle = Lifecycle([on_experts(ignore=[*IGNORE, "re:.*experts.*"])])
    lifecycle.initialize(State(model=model))
    assert not any(set_aside(module) for module in model.modules())
    lifecycle.finalize(State(model=model))
    assert len(Quantized.find(model)) == 2 * 4


def test_experts_in_shards_are_refused(monkeypatch):
    model = ARCHITECTURES["mixtral"].build()
    monkeypatch.setattr(qat, "is_sharded", lambda module: hasattr(module, "num_experts"))
    with pytest.raises(ValueError, match=r"experts.0.gate_proj' is a part of a tensor that is sharded.*strategy='ddp'"):
        Lifecycle([on_experts()]).initialize(State(model=model))


@pytest.mark.parametrize("scheme", [pytest.param("NVFP4", marks=pytest.mark.slow), "W4A16"])
def test_a_trainer_exports_experts_and_a_resumed_run_ends_with_the_same_bits(tmp_path, scheme):
    def callback():
        sized = {"group_size": 16} if scheme == "W4A16" else {"group_size": None}
        return CompressionCallback(on_experts(scheme=scheme, **sized), evaluate=False, verify=False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(tmp_path / "whole", callback(), max_epochs=2).fit(Language())
    unread = [str(w.message) for w in caught if "transformers" in str(w.message) and "read" in str(w.message)]
    assert bool(unread) == (scheme == "NVFP4"), unread  # what plain transformers reads is known before the run
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=-1)
    cut = quiet(tmp_path, callback(), keeping, Cut(9), max_epochs=2)
    with pytest.raises(KeyError, match="power cut"):
        cut.fit(Language())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Language().state_dict())
    quiet(tmp_path / "resumed", callback(), max_epochs=2).fit(
        Language(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    whole, resumed = (load_file(tmp_path / n / "compressed" / "model.safetensors") for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert sum(".experts." in name and name.endswith("weight_packed") for name in whole) == 24
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), resumed[name].view(torch.uint8)), name
    config = json.loads((tmp_path / "whole" / "compressed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


RANKS = """
import sys, torch
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy
from lightning_compress import CompressionCallback
from tests.modifiers.test_qat_experts import Language, on_experts
from tests.support.training_runs import quiet

folder, model = Path(sys.argv[1]), Language()
callback = CompressionCallback(on_experts(), evaluate=False, verify=False)
quiet(folder, callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2).fit(model)
torch.save(model.state_dict(), folder / f"rank{model.trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_experts(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert list(first) == list(Language().state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = load_file(tmp_path / "compressed" / "model.safetensors")
    assert sum(".experts." in name and name.endswith("weight_packed") for name in names) == 24
