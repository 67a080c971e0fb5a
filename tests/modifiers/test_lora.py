"""QLoRA: what trains, what stays, what a checkpoint holds, and what is merged and quantized in the end."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    CompressionCallback,
    GPTQModifier,
    LoRAModifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
    save,
)
from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.lora import CHILD
from lightning_compress.quant.record import Quantized
from tests.support.training_runs import StopAfter, Sums, quiet

W4 = {"scheme": "W4A16", "group_size": 8}


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)


class Foreign(LightningModule):
    """Its optimizer gets all parameters, and its weights do not know of adapters."""

    def __init__(self, seed: int = 0, lr: float = 0.05):
        super().__init__()
        self.model, self.lr = network(seed), lr
        self.bases, self.losses = [], []

    def training_step(self, batch, batch_idx):
        x, _ = batch
        loss = nn.functional.mse_loss(self.model(x.to(self.dtype)), x.to(self.dtype).roll(1, -1))
        self.bases.append(self.model[0].weight.detach().clone())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        self.log("val/mse", nn.functional.mse_loss(self.model(x.to(self.dtype)), x.to(self.dtype).roll(1, -1)))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def recipe(**options) -> list:
    return [GPTQModifier(start=0, **W4), LoRAModifier(**W4, rank=4, alpha=8, **options)]


def fit(folder, module, modifiers, *, ckpt_path=None, **options):
    callback = CompressionCallback(modifiers, calibration_batches=2)
    torch.manual_seed(0)
    trainer = quiet(folder, callback, **{"max_epochs": 3, **options})
    trainer.fit(module, Sums(), ckpt_path=ckpt_path)
    return trainer


def test_training_begins_with_the_outputs_of_the_base_and_moves_the_adapters_alone():
    model, x = network(), torch.randn(5, 8)
    y, before = model(x), {n: p.clone() for n, p in model.named_parameters()}
    modifier = LoRAModifier(**W4, rank=4)
    Lifecycle([modifier]).initialize(State(model=model))
    assert torch.equal(model(x), y)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{CHILD}.{name}" for name in ("A_KC", "B_RK") for i in (0, 2)}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (8 + 16) + 4 * (16 + 8)
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not torch.equal(model(x), y)


def test_the_adapter_is_the_product_of_the_paper():
    model, x = network()[:1], torch.randn(5, 8)
    modifier = LoRAModifier(**W4, rank=4, alpha=6)
    Lifecycle([modifier]).initialize(State(model=model))
    A_KC, B_RK = model[0].lora_adapter.A_KC, model[0].lora_adapter.B_RK
    nn.init.normal_(B_RK)
    expected = nn.functional.linear(x, model[0].weight + 6 / 4 * B_RK @ A_KC, model[0].bias)
    assert_close(model(x), expected)
    modifier._merge()
    assert_close(model(x), expected)
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_acts_on_the_adapter_while_training_alone():
    model, x = network()[:1], torch.randn(64, 8)
    modifier = LoRAModifier(**W4, rank=4, dropout=0.5)
    Lifecycle([modifier]).initialize(State(model=model))
    nn.init.normal_(model[0].lora_adapter.B_RK)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_run_quantizes_first_trains_merges_and_quantizes_again(tmp_path, precision):
    module = Foreign()
    trainer = fit(tmp_path, module, recipe(), precision=precision)
    first = module.bases[0]
    assert all(torch.equal(base, first) for base in module.bases)
    assert all(len(group.unique()) <= 16 for group in first.reshape(-1, 8))
    assert module.losses[-1] < 0.8 * module.losses[0]
    assert not torch.equal(module.model[0].weight.to(first.dtype), first)
    assert all(len(group.unique()) <= 16 for group in module.model[0].weight.reshape(-1, 8))
    assert set(Quantized.find(module.model)) == {"0", "2"}
    assert [row.technique for row in trainer.callbacks[0].ledger if row.module == "0"] == ["gptq", "qlora"]
    dtype = module.model[0].weight.dtype
    assert dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    again = load(tmp_path / "compressed", network(1, dtype), packed=False)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in module.model.state_dict().items())


def test_without_training_it_is_the_quantizer_before_it():
    one, other = network(), network()
    batches = [torch.randn(64, 8)]
    ledger = compress(one, recipe(), batches)
    compress(other, GPTQModifier(**W4), batches)
    assert [row.technique for row in ledger] == ["gptq", "gptq"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    compress(alone := network(), LoRAModifier(**W4), batches)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), other.parameters(), strict=True))


def test_patterns_do_not_select_adapters(tmp_path):
    module, named = Foreign(), {**W4, "targets": ["re:.*"]}
    trainer = fit(tmp_path, module, [GPTQModifier(start=0, **named), LoRAModifier(**named, rank=4)])
    assert {row.module for row in trainer.callbacks[0].ledger} == {"0", "2"}


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, half, resumed = Foreign(), Foreign(), Foreign(seed=5)
    fit(tmp_path / "whole", whole, recipe(dropout=0.1))
    callback = CompressionCallback(recipe(dropout=0.1), calibration_batches=2)
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    torch.manual_seed(0)
    with pytest.raises(KeyError, match="power cut"):
        quiet(tmp_path / "half", callback, saver, StopAfter(6), max_epochs=3).fit(half, Sums())
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    fit(tmp_path / "resumed", resumed, recipe(dropout=0.1), ckpt_path=checkpoint)
    assert resumed.losses == whole.losses[4:]
    for one, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_loaded_model_trains_from_its_folder(tmp_path):
    model = network()
    compress(model, QuantizationModifier(**W4))
    module = Foreign()
    module.model = load(save(model, tmp_path / "first"), network(1), packed=False)
    fit(tmp_path, module, LoRAModifier(**W4, rank=4))
    assert all(torch.equal(base, model[0].weight) for base in module.bases)
    assert module.losses[-1] < module.losses[0]
    assert set(Quantized.find(module.model)) == {"0", "2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5}, "start=0.5, end=None, update=None: adapters train in the whole run"),
        ({"end": 5}, "end=5.0"),
        ({"scheme": "W8A8", "group_size": None}, "W8A8 .* quantizes inputs, and adapters train beside quantized we"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1}, "dropout"),
    ],
    ids=["start", "end", "inputs", "rank", "dropout"],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAModifier(**{**W4, **options})


def test_models_that_cannot_work():
    conv = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"'0' \(Conv2d\): adapters are for nn.Linear"):
        Lifecycle([LoRAModifier(**W4, targets=["Linear", "Conv2d"])]).initialize(State(model=conv))
    other = {"scheme": "W3A16", "group_size": 8}
    with pytest.raises(
        ValueError, match="continues from GPTQModifier, which quantizes '0' as W3A16 .* give both the same"
    ):
        Lifecycle([GPTQModifier(start=0, **other), LoRAModifier(**W4)]).initialize(State(model=network()))
    with pytest.raises(ValueError, match="quantize '0'"):
        Lifecycle([LoRAModifier(**W4), QATModifier(**W4)]).initialize(State(model=network()))
    part = network()
    compress(part, QuantizationModifier(**W4))
    with pytest.raises(ValueError, match=r"'2' is quantized already .* not among the targets"):
        Lifecycle([LoRAModifier(**W4, ignore=["2"])]).initialize(State(model=part))
    assert set(Quantized.find(part)) == {"0", "2"}
