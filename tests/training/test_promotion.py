"""Promotion: which modules get more bits, and that a promoted run is the run that has these schemes from the start."""

import json

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    AWQModifier,
    CompressionCallback,
    GPTQModifier,
    MagnitudePruningModifier,
    QATModifier,
    QuantizationModifier,
)
from lightning_compress.quant.schemes import from_groups, from_presets
from lightning_compress.training import post_training
from lightning_compress.training.gate import GateError
from lightning_compress.training.promotion import DenseWeights, Promotion, promoted
from tests.support.training_runs import quiet
from tests.support.two_ranks import run_two_ranks

(W3,) = from_presets("W3A16", ["Linear"], 32)
(W8,) = from_presets("W8A16", ["Linear"], 32)


def bits(schemes):
    return [0 if scheme is None else scheme.weights.num_bits for scheme in schemes.values()]


def test_the_worst_share_goes_a_step_up_siblings_together_and_in_the_last_round_all_get_8_bits():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b", "c", "d"]
    errors = dict(zip(names, [0.9, 0.1, 0.1, 0.3, 0.2, 0.05, 0.01], strict=True))  # of the three siblings 0.37
    sizes = dict.fromkeys(names, 10)
    first = promoted(dict.fromkeys(names, W3), errors, sizes, 1, 3)
    assert bits(first) == [4, 4, 4, 3, 3, 3, 3]
    second = promoted(first, errors, sizes, 2, 3)
    assert bits(second) == [8, 8, 8, 4, 3, 3, 3]
    assert bits(promoted(second, errors, sizes, 3, 3)) == [8] * 7
    assert first["b"] is W3


def test_above_8_bits_the_worst_half_stays_dense():
    names = ["a", "b", "c", "d"]
    errors, sizes = dict(zip(names, [0.1, 0.4, 0.3, 0.2], strict=True)), dict.fromkeys(names, 10)
    assert bits(promoted(dict.fromkeys(names, W8), errors, sizes, 1, 3)) == [8, 0, 8, 8]
    assert bits(promoted(dict.fromkeys(names, W8), errors, sizes, 3, 3)) == [8, 0, 0, 8]


class Net(L.LightningModule):
    """Rows of very different size, which few bits cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 1))
        with torch.no_grad():
            self.model[3].weight[:, ::4] *= 8

    def loss(self, batch):
        return (self.model(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    DATA = DataLoader(TensorDataset(X, Net().model(X)), 16)  # the dense model has no loss


def run(folder, modifiers, limit=None, **options):
    callback, module = CompressionCallback(modifiers, gate=gate(limit), **options), Net()
    trainer = quiet(folder, callback)
    trainer.fit(module, DATA, DATA)
    return callback, module


def gate(limit):
    return None if limit is None else {"metric": "val/loss", "max_increase": limit}


KINDS = {
    "rtn": lambda **scheme: [QuantizationModifier(**scheme)],
    "gptq": lambda **scheme: [GPTQModifier(**scheme)],
    "awq": lambda **scheme: [AWQModifier(n_grid=4, **scheme)],
    "awq, gptq": lambda **scheme: [AWQModifier(n_grid=4, quantize=False, **scheme), GPTQModifier(**scheme)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_a_run_with_the_schemes_that_were_chosen(tmp_path, kind):
    W2 = {"scheme": "W2A16", "group_size": 32}
    first, _ = run(tmp_path / "first", KINDS[kind](**W2))
    loss = first.run.facts["metric"]["val/loss"]["after"]
    callback, module = run(tmp_path / "promoted", KINDS[kind](**W2), loss / 3, on_gate="promote")
    facts = callback.run.facts
    assert facts["gate"][0]["held"]
    assert [entry["round"] for entry in facts["promotion"]] == list(range(1, len(facts["promotion"]) + 1))
    content = yaml.safe_load((tmp_path / "promoted" / "report" / "promotion.yaml").read_text())
    groups = content if "config_groups" in content else content["modifiers"]["GPTQModifier"]
    assert max(scheme.weights.num_bits for scheme in from_groups(groups["config_groups"])) > 2
    again, other = run(tmp_path / "again", KINDS[kind](**groups))
    state, expected = module.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert facts["metric"] == again.run.facts["metric"]
    flags = [flag for row in callback.ledger for flag in row.flags if flag.startswith("promoted from W2A16 g32 sym to")]
    assert len(flags) == len({name for entry in facts["promotion"] for name in entry["promoted"]})
    assert (
        json.loads((tmp_path / "promoted" / "report" / "summary.json").read_text())["promotion"] == facts["promotion"]
    )
    assert not (tmp_path / "promoted" / "calibration_log").exists()


def test_a_gate_that_no_bits_reach_fails_after_its_rounds(tmp_path):
    with pytest.raises(GateError, match="max_increase 0: not held"):
        run(tmp_path, KINDS["rtn"](scheme="W2A16", group_size=32), 0.0, on_gate="promote")
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert len(summary["promotion"]) == 3
    assert {step.split(" -> ")[1] for step in summary["promotion"][2]["promoted"].values()} == {"W8A16 g32 sym"}


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        (
            [QATModifier(scheme="W4A16")],
            "with more bits, which QATModifier does not allow: it works where all modifiers",
        ),
        ([QuantizationModifier(scheme="W4A16"), MagnitudePruningModifier(final_sparsity=0.5)], "MagnitudePruning"),
        (
            [QuantizationModifier(scheme="NVFP4A16")],
            "raises the bits of integers, and QuantizationModifier has NVFP4A16",
        ),
    ],
    ids=["qat", "pruning", "floats"],
)
def test_what_cannot_be_promoted_is_refused_at_once(modifiers, message):
    with pytest.raises(ValueError, match=message):
        CompressionCallback(modifiers, gate=gate(1), on_gate="promote")


def test_sharded_weights_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(post_training, "shards", lambda trainer: True)
    with pytest.raises(ValueError, match="goes back to whole dense weights, which SingleDeviceStrategy shards"):
        run(tmp_path, KINDS["rtn"](scheme="W4A16", group_size=32), 1.0, on_gate="promote")
    assert not (tmp_path / "compressed.ckpt").exists()


def test_promotion_needs_a_gate_and_a_known_word():
    with pytest.raises(ValueError, match="on_gate='promote' has no gate to reach"):
        CompressionCallback(QuantizationModifier(scheme="W4A16"), on_gate="promote")
    with pytest.raises(ValueError, match="on_gate='warn': expected 'fail' or 'promote'"):
        CompressionCallback(QuantizationModifier(scheme="W4A16"), gate=gate(1), on_gate="warn")


def test_a_run_that_dies_in_a_round_begins_anew_from_the_dense_model(tmp_path, monkeypatch):
    W2 = {"scheme": "W2A16", "group_size": 32}
    _, expected = run(tmp_path / "whole", KINDS["gptq"](**W2), 0.0001, on_gate="promote")

    def die(*args):
        raise KeyError("power cut")

    note = Promotion.note
    monkeypatch.setattr(Promotion, "note", die)
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path / "cut", KINDS["gptq"](**W2), 0.0001, on_gate="promote")
    monkeypatch.setattr(Promotion, "note", note)
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left <= {"calibration_log", "checkpoints"}
    with pytest.warns(UserWarning, match="is not used, as it differs in"):
        callback, module = run(tmp_path / "cut", KINDS["gptq"](**W2), 0.0001, on_gate="promote")
    assert len(callback.run.facts["promotion"]) > 1
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def test_ranks_promote_together(tmp_path):
    def work(rank):
        ddp = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
        callback = CompressionCallback(
            KINDS["gptq"](scheme="W2A16", group_size=32), gate=gate(0.0001), on_gate="promote"
        )
        module = Net()
        quiet(tmp_path, callback, **ddp).fit(module, DATA, DATA)
        torch.save([module.state_dict(), callback.run.facts["promotion"]], tmp_path / f"rank{rank}.pt")

    assert run_two_ranks(work, tmp_path, 90) == ["", ""]
    (zero, rounds), (one, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert len(rounds) == len(others) > 0
    dense = Net().state_dict()
    assert not torch.equal(zero["model.0.weight"], dense["model.0.weight"])


def test_dense_weights_come_back_bit_for_bit(tmp_path):
    model = nn.BatchNorm1d(3, dtype=torch.bfloat16)
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("flags", torch.tensor([True, False]))
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    saved, copies = DenseWeights(model, tmp_path), {name: t.detach().clone() for name, t in tensors.items()}
    for tensor in tensors.values():
        tensor.data.fill_(1 - tensor.flatten()[0].item() if tensor.numel() else 0)
    saved.restore(model)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in tensors.items())
    assert not any(tmp_path.iterdir())
    model.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match="cannot go back to the dense model: more came or went meanwhile"):
        saved.restore(model)
