"""Fused experts as Linears: the same function, the same keys, every expert's tokens its own."""

import copy
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralForCausalLM

from lightning_compress import AWQModifier, GPTQModifier, QuantizationModifier, SparseGPTModifier, compress, load, save
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows, write_matrix
from lightning_compress.layers.split_experts import (
    PROJECTIONS,
    fused_experts,
    is_split,
    join,
    split,
    split_while,
    watched,
)
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")
W4 = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}


def made(name="mixtral"):
    architecture = ARCHITECTURES[name]
    return architecture.build(), architecture.batches()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def watch(model, hook):
    return [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, ExpertLinear)]


def starve(model, expert=2):
    """A router that never sends a token to one expert of the first layer."""
    first = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.gate"))
    first.register_forward_hook(lambda m, args, out: _without(m, args[0], expert))
    return model


def _without(router, x, expert):
    scores = x.reshape(-1, x.shape[-1]) @ router.weight.detach().T
    scores[:, expert] = -torch.inf
    weights, index = scores.softmax(-1).topk(router.top_k)
    return scores, weights, index


@pytest.mark.parametrize("name", MIXTURES)
def test_splitting_changes_neither_logits_nor_keys_nor_parameters(name):
    model, batches = made(name)
    dense, keys = logits(model, batches[0]), list(model.state_dict())
    count = sum(p.numel() for p in model.parameters())
    names = split(model)
    assert names == list(fused_experts(model))
    assert split(model) == []
    assert torch.equal(logits(model, batches[0]), dense)  # unwatched: the module's own code
    handles = watch(model, lambda *_: None)
    assert_close(logits(model, batches[0]), dense, rtol=0, atol=1e-5)  # watched: expert after expert
    with watched(model, all_experts=True):
        assert_close(logits(model, batches[0]), dense, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == count
    for handle in handles:
        handle.remove()
    join(model)
    assert not any(is_split(m) for m in model.modules())
    assert torch.equal(logits(model, batches[0]), dense)


def test_a_slice_writes_into_the_fused_tensor_and_survives_a_copy():
    model, _ = made()
    split(model)
    twin = copy.deepcopy(model)
    path = "model.layers.1.mlp.experts"
    for part, rows in {"gate_proj": slice(0, 64), "up_proj": slice(64, 128)}.items():
        linear = twin.get_submodule(f"{path}.3.{part}")
        write_matrix(linear, torch.full((64, 32), 7.0))
        assert (twin.get_submodule(path).gate_up_proj[3, rows] == 7).all()
        assert (as_matrix(linear) == 7).all()
    assert not (model.get_submodule(path).gate_up_proj == 7).any()
    assert [n for n, _ in twin.get_submodule(f"{path}.0").named_children()] == list(PROJECTIONS)


def test_each_expert_sees_the_tokens_that_the_router_sends_and_no_padding():
    model, batches = made()
    split(model)
    seen, routed = {}, {}
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, :9] = False
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            module.register_forward_pre_hook(
                lambda m, args, n=name: seen.__setitem__(n, inputs_as_rows(m, args[0], mask).shape[1])
            )
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, args, n=name: routed.__setitem__(n, args[1]))
    logits(model, batches[0])
    assert len(routed) == 2
    for name, index in routed.items():
        for expert in range(4):
            wanted = int(((index == expert).any(1) & mask.flatten()).sum())
            assert {seen.get(f"{name}.{expert}.{part}", 0) for part in PROJECTIONS} == {wanted}


def test_gptq_of_an_expert_is_gptq_of_a_linear_fed_its_tokens():
    """The slice solved in the mixture equals a Linear of its own, given the rows that the router sent."""
    model, batches = made()
    path, taken = "model.layers.0.mlp.experts", []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: taken.append((args[0], args[1])))
    dense = model.get_submodule(path).gate_up_proj.detach().clone()
    quantize = {"targets": ["re:.*layers.0.mlp.experts.*gate_proj"], "scheme": "W4A16", "group_size": 16}
    for batch in batches:
        logits(model, batch)
    hook.remove()
    compress(model, GPTQModifier(**quantize), batches)
    rows = torch.cat([x[(index == 1).any(1)] for x, index in taken])
    alone = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False))
    alone[0].weight.data = dense[1, :64].clone()
    compress(alone, GPTQModifier(scheme="W4A16", group_size=16), [rows])
    assert_close(model.get_submodule(path).gate_up_proj[1, :64], alone[0].weight, rtol=0, atol=1e-6)
    assert torch.equal(model.get_submodule(path).gate_up_proj[:, 64:], dense[:, 64:])


def test_an_expert_without_tokens_is_rounded_and_named():
    model, batches = made()
    starve(model)
    with pytest.warns(UserWarning, match=r"no calibration token .*layers.0.mlp.experts \(2\).*moe_calibrate_all_expe"):
        ledger = compress(model, GPTQModifier(**W4), batches)
    rows = {row.module: row for row in ledger if row.module.startswith("model.layers.0.mlp.experts")}
    assert len(rows) == 12
    for part in PROJECTIONS:
        row = rows[f"model.layers.0.mlp.experts.2.{part}"]
        assert row.tokens == 0
        assert row.flags == ["never saw data; rounded to nearest"]
    assert all(row.tokens > 0 and not row.flags for name, row in rows.items() if ".experts.2." not in name)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(record.scale.isfinite().all() for _, record in Quantized.find(model).values())


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_all_experts_see_all_tokens_when_told(walk):
    model, batches = made()
    starve(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ledger = compress(model, GPTQModifier(**W4), batches, walk=walk, moe_calibrate_all_experts=True)
    assert not [w for w in caught if "no calibration token" in str(w.message)]
    assert {row.tokens for row in ledger if ".experts." in row.module} == {4 * 64}


def test_static_activation_scales_of_experts(tmp_path):
    """FP8 with calibrated scales: the split stays, since inputs are quantized; our own load restores it."""
    model, batches = made("qwen3_moe")
    compress(model, QuantizationModifier(scheme="FP8", ignore=["lm_head"]), batches, moe_calibrate_all_experts=True)
    wanted = logits(model, batches[0])
    with pytest.warns(UserWarning, match="will not quantize the inputs of 24 projections of experts"):
        folder = save(model, tmp_path / "fp8")
    again = load(folder, packed=False)
    assert torch.equal(logits(again, batches[0]), wanted)
    assert Quantized.find(again).keys() == Quantized.find(model).keys()


@pytest.mark.parametrize("scheme", ["W8A8", "NVFP4A16", "W4A16_ASYM"])
def test_formats_of_experts_that_transformers_cannot_unpack_are_said(tmp_path, scheme):
    model, batches = made()
    size = {"group_size": 16} if scheme == "W4A16_ASYM" else {}
    compress(model, QuantizationModifier(scheme=scheme, ignore=["lm_head"], **size), batches)
    with pytest.warns(UserWarning, match="will (fail to )?load .*of the formats of experts it unpacks packed integers"):
        folder = save(model, tmp_path / "out")
    assert torch.equal(logits(load(folder, packed=False), batches[0]), logits(model, batches[0]))
    if scheme == "NVFP4A16":
        return  # loads, and is not the model
    with pytest.raises(RuntimeError):
        MixtralForCausalLM.from_pretrained(folder)


def test_nothing_stays_behind_when_experts_are_not_quantized(tmp_path):
    model, batches = made()
    compress(model, SparseGPTModifier(sparsity=0.5, ignore=["lm_head"]), batches)
    assert not any(is_split(m) for m in model.modules())
    share = (model.model.layers[0].mlp.experts.down_proj == 0).float().mean()
    assert abs(float(share) - 0.5) < 0.01
    again = MixtralForCausalLM.from_pretrained(save(model, tmp_path / "sparse"))
    assert_close(logits(again, batches[0]), logits(model, batches[0]), rtol=0, atol=1e-5)


def test_awq_names_its_experts_and_saving_twice_gives_the_same_bytes(tmp_path):
    model, batches = made("qwen3_moe")
    ledger = compress(model, AWQModifier(n_grid=3, **W4), batches)
    assert {row.module for row in ledger} >= {f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(4)}
    folder = save(model, tmp_path / "one")
    again = save(load(folder, packed=False), tmp_path / "two")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_a_layout_that_cannot_be_split_is_named():
    class Transposed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = (torch.nn.Parameter(torch.randn(2, 4, n)) for n in (12, 8))

    model = torch.nn.Sequential(Transposed())
    told = pytest.warns(UserWarning, match=r"experts of '0' \(Transposed\) are left as they are: .* transposed")
    with told, split_while(model):
        assert not is_split(model[0])
