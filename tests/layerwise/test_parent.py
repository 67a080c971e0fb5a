"""The parent of layers: which module it is, its recorded calls, its error over all calls or over pieces of them."""

import pytest
import torch
from torch import nn

from lightning_compress.layerwise.parent import ParentCalls, common_parent, counted, first_tensor, record_calls


class Mixing(nn.Module):
    """A parent whose samples are independent, unless ``across``."""

    def __init__(self, across: bool = False):
        super().__init__()
        self.linear, self.across = nn.Linear(6, 6), across

    def forward(self, x, shift, scale=None):
        y = self.linear(x) * scale + shift
        return (y - y.mean(0) if self.across else y,)


def recorded(module, samples=5, tokens=4):
    calls = ParentCalls(module)
    for _ in range(2):
        x, shift, scale = torch.randn(samples, tokens, 6), torch.randn(1, tokens, 6), torch.rand(samples, 1, 1)
        mask = torch.rand(samples, tokens) > 0.3
        with torch.no_grad():
            calls.add((x, shift), {"scale": scale}, module(x, shift, scale=scale)[0], mask)
    return calls


def test_pieces_have_the_error_of_all_calls():
    module = Mixing()
    calls = recorded(module)
    pieces = calls.split(8)
    assert [len(output) for output in pieces.outputs] == [2, 2, 1] * 2  # two samples of four tokens
    assert sum(pieces.tokens()) == sum(calls.tokens()) == sum(int(mask.sum()) for mask in calls.masks)
    module.linear.weight.data += 0.1 * torch.randn(6, 6)
    with torch.no_grad():
        total, by_pieces = (sum(each.squared_errors(each.places()).values()) for each in (calls, pieces))
        assert pieces.squared_errors([(0, 4), (1, 0)]) == {(0, 4): pieces.squared_errors(pieces.places())[0, 4]}
        direct = sum(
            float((module(*a, **k)[0] - y)[m].square().sum())
            for (a, k), y, m in zip(calls.arguments, calls.outputs, calls.masks, strict=True)
        )
    assert total == pytest.approx(direct, rel=1e-5)
    assert by_pieces == pytest.approx(total, rel=1e-5)
    assert calls.split(10_000) is calls


def test_a_parent_that_mixes_samples_is_not_split():
    with torch.no_grad():
        calls = recorded(Mixing(across=True))
        assert calls.split(8) is calls


def test_the_parent_is_the_innermost_module_with_a_forward_that_holds_all_layers():
    attention, mlp = nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}), nn.Sequential(nn.Linear(2, 2))
    block = nn.Module()
    block.attention, block.mlp, block.experts = attention, mlp, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    modules = {f"model.0.{name}" if name else "model.0": module for name, module in block.named_modules()}
    assert common_parent(["model.0.attention.q", "model.0.attention.k"], modules) == "model.0"  # not the ModuleDict
    assert common_parent(["model.0.mlp.0", "model.0.mlp.0"], modules) == "model.0.mlp"
    assert common_parent(["model.0.experts.0", "model.0.experts.1"], modules) == "model.0"
    assert common_parent(["model.0.mlp.0", "model.1.mlp.0"], modules) is None
    del modules["model.0.mlp.0"]  # in a block of its own
    assert common_parent(["model.0.attention.q", "model.0.attention.k"], modules) is None


def test_recorded_calls_are_copies_and_tensors_that_calls_share_are_copied_once():
    module, shift, mask = Mixing(), torch.zeros(1, 4, 6), torch.ones(5, 4, dtype=torch.bool)
    xs = [torch.randn(5, 4, 6) for _ in range(2)]

    def run():
        for x in xs:
            module(x, shift, scale=torch.ones(1))
            x.zero_()
        shift.fill_(7)

    with torch.no_grad():
        calls = record_calls({"a": module, "never": nn.Linear(2, 2)}, run, lambda: mask, lambda: 3)
        assert not calls["never"].outputs
        (first, _), (second, _) = calls["a"].arguments
        assert first[1] is second[1]
        assert first[0].std() > 0
        assert not first[1].any()
        assert calls["a"].squared_errors([(3, 0), (3, 1)]) == {(3, 0): 0.0, (3, 1): 0.0}
    assert calls["a"].tokens() == [20, 20]
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_tokens_that_count_in_outputs_of_either_shape():
    mask = torch.tensor([[True, False], [True, True]])
    y = torch.arange(8.0).view(2, 2, 2)
    expected = torch.tensor([[0.0, 1.0], [4.0, 5.0], [6.0, 7.0]])
    assert torch.equal(counted(y, mask), expected)
    assert torch.equal(counted(y.view(4, 2), mask), expected)
    pooled = torch.zeros(3, 2)
    assert counted(pooled, mask) is pooled
    assert counted(y, None) is y
    assert torch.equal(first_tensor({"ids": torch.tensor([1]), "h": y}), y)
    assert first_tensor((torch.tensor([1]), None)).numel() == 0
