"""Weights of recurrent modules and attentions as modules: names, matching, what stays as it was, the folder."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from lightning_compress import (
    GPTQModifier,
    MagnitudePruningModifier,
    QuantizationModifier,
    SparseGPTModifier,
    compress,
    dequantize,
    load,
    save,
)
from lightning_compress.layers.dense_keys import original_weight, parametrization_of, put_on, take_off
from lightning_compress.layers.matching import select_weights
from lightning_compress.layers.module_weights import ModuleWeight, hide, reveal, weights_inside
from lightning_compress.quant.record import Quantized

W8 = {"scheme": "W8A16", "group_size": -1}
W4 = {"scheme": "W4A16", "group_size": 8}


class Recurrent(nn.Module):
    """A recurrent module and a Linear."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.encoder = kind(8, 16, **options)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        y = self.encoder(x)[0]
        return self.head(y[..., :16] + y[..., -16:])  # both directions


class Attending(nn.Module):
    """An attention and a Linear."""

    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        other = torch.cat([x, x], -1) if self.attention.kdim == 16 else x
        return self.head(self.attention(x, other, other, need_weights=False)[0])


class Stepping(nn.Module):
    """A cell, called once, and a Linear."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.cell(x[:, 0], x[:, 1].repeat(1, 2)))


MODELS = {
    "LSTM": lambda: Recurrent(num_layers=2, bidirectional=True, batch_first=True),
    "LSTM, steps first": lambda: Recurrent(bidirectional=True),
    "GRU": lambda: Recurrent(nn.GRU, bias=False),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRUCell": Stepping,
    "MultiheadAttention": Attending,
    "MultiheadAttention of other sizes": lambda: Attending(kdim=16, vdim=16),
}
KINDS = ["LSTM", "GRU", "RNN", "GRUCell", "MultiheadAttention"]


def made(kind, seed=0):
    torch.manual_seed(seed)
    return MODELS[kind]().eval()


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, 8, generator=generator) for _ in range(count)]


@torch.no_grad()
def outputs(model):
    return model(batches(1)[0])


def inside(model):
    return [name for name, module in model.named_modules() if isinstance(module, ModuleWeight)]


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("GRU", "GRU", ["encoder.ih_l0", "encoder.hh_l0"]),
        ("GRU", "encoder", ["encoder.ih_l0", "encoder.hh_l0"]),
        ("GRU", "encoder.hh_l0", ["encoder.hh_l0"]),
        ("GRU", "re:enc.*hh", ["encoder.hh_l0"]),
        ("GRU", "RNNBase", ["encoder.ih_l0", "encoder.hh_l0"]),
        ("GRUCell", "GRUCell", ["cell.ih", "cell.hh"]),
        ("MultiheadAttention", "MultiheadAttention", [f"attention.{n}_proj" for n in "qkv"]),
        ("MultiheadAttention", "re:.*attention.*", [*(f"attention.{n}_proj" for n in "qkv"), "attention.out_proj"]),
        ("MultiheadAttention", "Linear", ["attention.out_proj", "head"]),
        ("GRU", "Linear", ["head"]),
    ],
)
def test_a_target_reaches_the_weights_of_the_module_it_names(kind, target, expected):
    assert sorted(select_weights(made(kind), [target])) == sorted(expected)


def test_linear_means_what_it_meant_also_while_weights_are_modules():
    model = made("MultiheadAttention")
    reveal(model)
    assert inside(model) == [f"attention.{n}_proj" for n in "qkv"]
    assert list(select_weights(model, ["Linear"])) == ["attention.out_proj", "head"]
    assert list(select_weights(model, ["MultiheadAttention"], ["re:.*k_proj"])) == [f"attention.{n}_proj" for n in "qv"]


def test_weights_that_something_else_computes_are_named():
    model = made("GRU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.encoder, "weight_hh_l0")
    with pytest.warns(
        UserWarning, match=r"weight_hh_l0 of 'encoder' \(GRU\) cannot be compressed .* after weight_norm"
    ):
        assert list(select_weights(model, ["GRU"])) == ["encoder.ih_l0"]
    model = made("GRU")
    parametrize.register_parametrization(model.encoder, "weight_ih_l0", nn.Identity())
    (weight,) = select_weights(model, ["encoder.hh_l0"]).values()
    with pytest.raises(ValueError, match=r"has a parametrization on another of its weights; remove it first"):
        put_on(weight, nn.Identity())


def test_inputs_cannot_be_quantized():
    with pytest.raises(ValueError, match=r"inputs of 'encoder.ih_l0', 'encoder.hh_l0', which GRU multiply .*as W8A16"):
        compress(made("GRU"), QuantizationModifier(targets=["GRU"], scheme="W8A8"), batches())


def test_a_weight_that_two_modules_share_is_refused():
    model = nn.ModuleList([nn.GRU(8, 8), nn.GRU(8, 8)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    for modifier in (QuantizationModifier(targets=["GRU"], **W8), SparseGPTModifier(targets=["GRU"]),
                     MagnitudePruningModifier(targets=["GRU"])):  # fmt: skip
        with pytest.raises(ValueError, match=r"weight of '0.hh_l0' is shared with '1.weight_hh_l0'"):
            compress(model, modifier, [torch.randn(3, 2, 8)])


# -- compressed -------------------------------------------------------------------------------------------------------

MODIFIERS = {
    "rounded": lambda kind: QuantizationModifier(targets=["Linear", kind], **W8),
    "rounded in groups": lambda kind: QuantizationModifier(targets=["Linear", kind], **W4),
    "gptq": lambda kind: GPTQModifier(targets=["Linear", kind], **W4),
    "2:4": lambda kind: SparseGPTModifier(targets=["Linear", kind], mask_structure="2:4"),
}


@pytest.mark.parametrize("how", MODIFIERS)
@pytest.mark.parametrize("kind", MODELS)
def test_only_values_change_and_the_folder_gives_them_back(kind, how, tmp_path):
    model, class_name = made(kind), kind.split()[0].rstrip(",")
    before, keys = outputs(model), list(model.state_dict())
    ledger = compress(model, MODIFIERS[how](class_name), batches())
    assert list(model.state_dict()) == keys
    error = ((outputs(model) - before).norm() / before.norm()).item()
    assert 0 < error < {"rounded": 0.02, "2:4": 0.9}.get(how, 0.3)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    assert sum(row.params for row in ledger) == sum(model.get_parameter(name).numel() for name in matrices)
    assert not any(row.flags for row in ledger)  # all of them saw data
    assert bool(inside(model)) == (how != "2:4")
    save(model, tmp_path / "folder")
    again = load(tmp_path / "folder", made(kind, seed=5), packed=False)
    assert torch.equal(outputs(again), outputs(model))
    records = {name: record for name, (_, record) in Quantized.find(model).items()}
    assert {name for name, _ in Quantized.find(again).items()} == set(records)
    if how != "2:4":
        stored = (tmp_path / "folder" / "model.safetensors").stat().st_size
        assert stored < sum(p.nbytes for p in model.parameters()) * 0.9 + 2500  # a header of 100 bytes for each tensor
        with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
            assert not set(matrices) & set(file.keys())  # all of them in codes


def test_gptq_leaves_a_smaller_error_than_rounding():
    errors = {}
    for how in ("rounded in groups", "gptq"):
        model = made("LSTM")
        before = outputs(model)
        compress(model, MODIFIERS[how]("LSTM"), batches(16))
        errors[how] = (outputs(model) - before).norm() / before.norm()
    assert errors["gptq"] < 0.7 * errors["rounded in groups"]


def test_one_of_three_parts_of_a_parameter_is_packed_and_the_others_are_dense(tmp_path):
    model = made("MultiheadAttention")
    dense = model.attention.in_proj_weight.detach().clone()
    compress(model, QuantizationModifier(targets=["attention.k_proj"], **W4))
    assert torch.equal(model.attention.in_proj_weight[:8], dense[:8])
    assert not torch.equal(model.attention.in_proj_weight[8:16], dense[8:16])
    assert torch.equal(model.attention.in_proj_weight[16:], dense[16:])
    save(model, tmp_path / "folder")
    again = load(tmp_path / "folder", made("MultiheadAttention", seed=5))
    assert torch.equal(outputs(again), outputs(model))
    assert inside(again) == ["attention.k_proj"]


@pytest.mark.slow
def test_a_clean_process_reads_the_folder_bit_for_bit(tmp_path):
    model = made("LSTM").bfloat16()
    x = batches(1)[0].bfloat16()
    compress(model, QuantizationModifier(targets=["Linear", "LSTM"], **W8))
    save(model, tmp_path / "folder")
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "answers.pt")
    program = (
        "import sys, torch; from lightning_compress import load; from tests.layers.test_module_weights import made\n"
        "x, y = torch.load(sys.argv[1] + '/answers.pt')\n"
        "model = load(sys.argv[1] + '/folder', made('LSTM', seed=9).bfloat16(), packed=False)\n"
        "with torch.no_grad(): assert torch.equal(model(x), y)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root, timeout=120)


def test_a_model_that_is_not_a_target_stays_without_children():
    model = made("LSTM")
    with pytest.warns(UserWarning, match=r"to compress LSTM too, give targets=\['Linear', 'LSTM'\]"):
        compress(model, QuantizationModifier(**W8))
    assert not inside(model)
    assert "forward" not in vars(model.encoder)


def test_records_come_off_and_the_model_is_as_before():
    model = made("GRU")
    compress(model, QuantizationModifier(targets=["GRU"], **W8))
    assert dequantize(model) == ["encoder.ih_l0", "encoder.hh_l0"]
    assert not inside(model)
    compress(model, QuantizationModifier(targets=["GRU"], **W8))  # anew


def test_a_forward_that_another_library_put_on_the_module_comes_back():
    model, calls = made("GRU"), []
    original = model.encoder.forward
    model.encoder.forward = replaced = lambda *args: (calls.append(1), original(*args))[1]
    compress(model, GPTQModifier(targets=["GRU"], **W4), batches())
    assert model.encoder.forward is replaced
    assert calls


# -- parametrized -----------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Twice the weight."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return self.factor * weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", [True, False])
def test_a_step_takes_part_in_the_forward_pass_and_comes_off(kind, leave):
    model, doubled = made(kind), made(kind)
    for weight in select_weights(doubled, [kind]).values():
        weight.weight.data.mul_(2)
    doubled_outputs, before, keys = outputs(doubled), outputs(model), list(model.state_dict())
    modules, parameters = select_weights(model, [kind]), dict(model.named_parameters())
    for module in modules.values():
        put_on(module, Doubled())
    hide(model)  # those with a step stay
    assert_close(outputs(model), doubled_outputs)
    assert_close(outputs(copy.deepcopy(model.double().float())), doubled_outputs)  # moves rebuild lists of weights
    model(batches(1)[0]).square().sum().backward()
    assert all(parametrization_of(module, Doubled).factor.grad.abs() > 0 for module in modules.values())
    assert list(model.state_dict()) == keys
    model.load_state_dict({name: value + 0 for name, value in model.state_dict().items()})
    for module in modules.values():
        assert torch.equal(original_weight(module), module.weight / 2)
        take_off(module, Doubled, leave)
    hide(model)
    assert not inside(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert_close(outputs(model), doubled_outputs if leave else before)
    assert not {"forward", "_init_flat_weights", "_update_flat_weights"} & set(vars(model.get_submodule(
        next(iter(modules)).rpartition(".")[0])))  # fmt: skip
    assert all(not weights_inside(module) for module in model.modules())
