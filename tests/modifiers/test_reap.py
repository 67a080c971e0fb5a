"""REAP: saliencies against the definition, experts removed for real, nothing changed where nothing was routed."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close

from lightning_compress import GPTQModifier, REAPModifier, compress, save
from lightning_compress.modifiers.reap import ExpertSaliency, experts_to_keep
from tests.support.architecture_models import ARCHITECTURES

MIXTURES = {
    "mixtral": ("num_local_experts", {}),
    "qwen3_moe": ("num_experts", {}),
    "deepseek_v3": ("n_routed_experts", {"n_routed_experts": 8}),
}


def made(name):
    architecture = ARCHITECTURES[name]
    architecture = replace(architecture, sizes={**architecture.sizes, **MIXTURES[name][1]})
    return architecture.build(), architecture.batches(), architecture


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_saliency_is_the_mean_over_routed_tokens_of_gate_times_norm():
    torch.manual_seed(0)
    x, weights = torch.randn(30, 6), torch.rand(30, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    index[index == 3] = 0  # expert 3 gets nothing
    matrices = torch.randn(4, 6, 6)
    whole, parts = ExpertSaliency(4), ExpertSaliency(4)
    whole.update(x, index, weights, lambda e, t: t @ matrices[e])
    for rows in torch.arange(30).split([7, 11, 12]):
        parts.update(x[rows], index[rows], weights[rows], lambda e, t: t @ matrices[e])
    for e in range(4):
        seen = [
            float(weights[t, k] / weights[t].sum() * (x[t] @ matrices[e]).norm())
            for t in range(30)
            for k in range(2)
            if index[t, k] == e
        ]
        assert whole.value()[e] == pytest.approx(sum(seen) / len(seen) if seen else 0.0, rel=1e-5)
    assert_close(whole.value(), parts.value())


def test_groups_of_a_router_lose_equally_many():
    saliency = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert experts_to_keep(saliency, 4).tolist() == [0, 1, 2, 5]
    assert experts_to_keep(saliency, 4, groups=2).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_removed_and_plain_transformers_loads_the_others(name, tmp_path):
    model, batches, architecture = made(name)
    field, before = MIXTURES[name][0], sum(p.numel() for p in model.parameters())
    total = getattr(model.config, field)
    ledger = compress(model, REAPModifier(sparsity=0.25), batches)
    kept = total * 3 // 4
    assert getattr(model.config, field) == kept
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            assert len(module.down_proj) == len(module.gate_up_proj) == module.num_experts == kept
            assert len(model.get_submodule(path.replace("experts", "gate")).weight) == kept
    assert sum(p.numel() for p in model.parameters()) < before
    assert ledger.rows
    assert all(row.technique == "reap" and f"kept {kept} of {total}" in row.flags[0] for row in ledger)
    wanted = logits(model, batches[0])
    again = getattr(transformers, architecture.model).from_pretrained(save(model, tmp_path / "out")).eval()
    assert again.config.num_local_experts == kept
    assert_close(logits(again, batches[0]), wanted, rtol=0, atol=1e-5)


def test_an_expert_that_no_token_is_routed_to_leaves_without_a_trace():
    architecture = ARCHITECTURES["deepseek_v3"]
    model = replace(architecture, sizes={**architecture.sizes, "n_group": 1}).build()
    batches, mixture = architecture.batches(), model.model.layers[1].mlp
    mixture.gate.e_score_correction_bias[2] = -100.0  # what it is routed by, not what it is weighed by
    dense = [logits(model, batch) for batch in batches]
    routed = []
    mixture.experts.register_forward_pre_hook(lambda m, args: routed.append(args[1]))
    for batch in batches:
        logits(model, batch)
    assert not any((index == 2).any() for index in routed)
    with pytest.warns(UserWarning, match="no token was sent to experts 2"):
        compress(model, REAPModifier(sparsity=0.25), batches)
    assert len(mixture.experts.down_proj) == len(mixture.gate.e_score_correction_bias) == 3
    for batch, before in zip(batches, dense, strict=True):
        assert_close(logits(model, batch), before, rtol=0, atol=1e-5)


def test_the_pruned_model_can_be_quantized_in_a_second_run(tmp_path):
    model, batches, architecture = made("qwen3_moe")
    compress(model, REAPModifier(sparsity=0.25), batches)
    ledger = compress(model, GPTQModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]), batches)
    assert len([row for row in ledger if ".experts." in row.module]) == 2 * 3 * 3
    again = getattr(transformers, architecture.model).from_pretrained(save(model, tmp_path / "out")).eval()
    assert_close(logits(again, batches[0]), logits(model, batches[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_a_share_outside_of_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.*should be (greater|less) than"):
        REAPModifier(sparsity=sparsity)


def test_fewer_experts_than_a_token_gets():
    model, batches, _ = made("mixtral")
    with pytest.raises(ValueError, match="leaves 1 of 4 experts .* picks 2 for each token; take at most 0.5"):
        compress(model, REAPModifier(sparsity=0.75), batches)
    assert len(model.model.layers[0].mlp.experts.down_proj) == 4


def test_a_model_without_experts():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts in one tensor"):
        compress(ARCHITECTURES["llama"].build(), REAPModifier(), ARCHITECTURES["llama"].batches())


def test_beside_another_modifier_it_is_refused():
    model, batches, _ = made("mixtral")
    with pytest.raises(ValueError, match="renumbers the experts"):
        compress(model, [REAPModifier(), GPTQModifier(scheme="W4A16", group_size=16, ignore=["lm_head"])], batches)
