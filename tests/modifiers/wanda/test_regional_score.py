"""The score of Wanda++ against the paper."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lightning_compress import WandaPruningModifier, compress
from tests.support.smoothing_models import batches, build, ignore

REFINED = {"regional_gradient": 100, "regional_rounds": 3, "regional_steps": 6, "regional_rate": 1e-3}


def pruned(model, data, **arguments):
    """A pruned copy, and the ledger."""
    model = copy.deepcopy(model)
    arguments = {"mask_structure": "2:4", "ignore": ignore(model)} | arguments
    return model, compress(model, WandaPruningModifier(**arguments), data)


@pytest.mark.parametrize("alpha", [100.0, 1e6])
def test_the_score_is_that_of_the_paper(alpha):
    """The first block, sample by sample, by plain autograd."""
    model, data = build("gelu"), batches("gelu")
    block, samples = copy.deepcopy(model[0]), [x[None] for batch in data for x in batch]
    squares = {name: torch.zeros_like(getattr(block, name).weight) for name in ("fc1", "fc2")}
    inputs = dict.fromkeys(squares, 0.0)
    for name in squares:
        getattr(block, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, inputs[name] + args[0].detach().square().sum((0, 1)))
        )
    for x in samples:
        block.zero_grad()
        block(x).square().sum().sqrt().backward()
        for name, total in squares.items():
            total += getattr(block, name).weight.grad ** 2
    found, _ = pruned(model, data, regional_gradient=alpha)
    for name, total in squares.items():
        W = getattr(block, name).weight.detach()
        score = (alpha * (total / len(samples)).sqrt() + (inputs[name] / len(samples)).sqrt()) * W.abs()
        keep = torch.zeros_like(W, dtype=torch.bool).reshape(-1, 4)
        keep.scatter_(1, score.reshape(-1, 4).topk(2, dim=1).indices, True)
        assert torch.equal(getattr(found[0], name).weight, W * keep.view_as(W))
    plain, _ = pruned(model, data)
    assert not torch.equal(plain[0].fc1.weight, found[0].fc1.weight)


def test_splitting_the_batches_changes_nothing():
    model, data = build("gelu"), batches("gelu")
    whole, _ = pruned(model, [torch.cat(data)], regional_gradient=100)
    parts, _ = pruned(model, [x[None] for batch in data for x in batch], regional_gradient=100)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_padding_does_not_count():
    model, data = build("llama"), batches("llama")
    other = copy.deepcopy(data)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    one, two = (pruned(model, d, **REFINED)[0] for d in (data, other))
    assert (data[1]["attention_mask"] == 0).any()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-5)
