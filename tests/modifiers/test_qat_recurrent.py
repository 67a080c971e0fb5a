"""Recurrent weights and those of attentions in training: on their grids, sparse, in a Trainer, resumed, exported."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionCallback, MagnitudePruningModifier, QATModifier, load
from lightning_compress.layers.module_weights import ModuleWeight

CLASSES = {
    "LSTM": lambda: nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True, dropout=0.1),
    "GRU": lambda: nn.GRU(8, 32, batch_first=True),
    "MultiheadAttention": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    ),
}


class Classifier(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = CLASSES[kind]()
        self.head = nn.Linear(8 if kind == "MultiheadAttention" else 32, 4)

    def forward(self, x):
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class Training(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.model = Classifier(kind)

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(kind, modifiers, root, epochs=2, ckpt_path=None):
    torch.manual_seed(0)
    module = Training(kind)
    data = DataLoader(TensorDataset(torch.randn(32, 6, 8), torch.randint(0, 4, (32,))), 8)
    saving = ModelCheckpoint(root / "checkpoints", save_top_k=-1, every_n_epochs=1)
    callback = CompressionCallback(modifiers)
    trainer = L.Trainer(
        max_epochs=epochs, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, callbacks=[callback, saving],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, sorted((root / "checkpoints").iterdir())


def is_restored(model):
    patched = [name for name in ("forward", "_update_flat_weights") if name in vars(model.body)]
    return not patched and not any("Parametrized" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_trained_model_and_its_folder_compute_the_same(kind, gradient, tmp_path):
    qat = QATModifier(targets=["Linear", kind], scheme="W4A16", group_size=8, gradient=gradient)
    keys = list(Training(kind).state_dict())
    module, checkpoints = fit(kind, qat, tmp_path)
    assert list(torch.load(checkpoints[-1], weights_only=False)["state_dict"]) == keys == list(module.state_dict())
    assert is_restored(module.model)
    assert any(isinstance(m, ModuleWeight) for m in module.modules())
    for name, parameter in module.model.named_parameters():
        if parameter.ndim == 2:
            assert all(len(group.unique()) <= 16 for group in parameter.detach().reshape(-1, 8)[:50]), name
    torch.manual_seed(1)
    x = torch.randn(3, 6, 8)
    again = load(tmp_path / "compressed", Classifier(kind), packed=False)
    assert torch.equal(again(x), module.model.eval()(x))


def test_the_layer_computes_with_rounded_weights_while_it_trains():
    torch.manual_seed(0)
    model, x = Classifier("LSTM").eval(), torch.randn(3, 6, 8)
    dense = model(x)
    from lightning_compress.core import Event, EventType, Ledger, State

    qat = QATModifier(targets=["LSTM"], scheme="W4A16", group_size=-1, gradient="ste")
    state = State(model=model, ledger=Ledger())
    qat.initialize(state)
    qat.update_event(state, Event(type_=EventType.BATCH_START))
    training = model(x)
    rounded = copy.deepcopy(model)  # computes the same
    assert torch.equal(rounded(x), training)
    assert not torch.equal(training, dense)
    training.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("original")}
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    qat.finalize(state)
    assert torch.equal(model(x), training)
    assert is_restored(model)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    qat = {"targets": ["Linear", "LSTM"], "scheme": "W4A16", "group_size": 8}
    unbroken, checkpoints = fit("LSTM", QATModifier(**qat), tmp_path / "a")
    resumed, _ = fit("LSTM", QATModifier(**qat), tmp_path / "b", ckpt_path=checkpoints[0])
    for (name, one), other in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_masks_hold_in_training_and_with_fake_quantization_after_it(kind, structure, tmp_path):
    pruning = MagnitudePruningModifier(targets=["Linear", kind], start=0, end=4, mask_structure=structure)
    qat = QATModifier(targets=["Linear", kind], scheme="W8A16", group_size=-1, start=4)
    module, checkpoints = fit(kind, [pruning, qat], tmp_path, epochs=3)
    states = [torch.load(path, weights_only=False)["state_dict"] for path in checkpoints]
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        zeros = parameter == 0
        assert zeros.float().mean().item() == pytest.approx(0.5, abs=0.01)
        assert ((states[-1][name] == 0) <= zeros).all()
        assert ((states[-2][name] == 0) == (states[-1][name] == 0)).all()  # an epoch of AdamW revives none
        assert not torch.equal(states[-2][name], states[-1][name])
        if structure == "2:4":
            assert (zeros.reshape(-1, 4).sum(1) >= 2).all()
