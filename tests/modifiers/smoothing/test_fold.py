"""Folding divides a source and multiplies its consumers; the check sees a wrong pair."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.modifiers.smoothing.fold import change_by_folding, fold, restored, scale_source, spread
from lightning_compress.modifiers.smoothing.pair import Consumer, Pair
from tests.support.smoothing_models import FF, NAMES, C, batches, find_pairs, output


@pytest.mark.parametrize("name", NAMES)
def test_folding_random_scales_changes_nothing(name):
    """Also with scales that are not powers of two, and on data that the finder did not use."""
    data = batches(name)
    model, modules, pairs = find_pairs(name, data)
    dense = copy.deepcopy(model)
    assert pairs
    for pair in pairs:
        fold(pair, modules, 0.2 + 4 * torch.rand(len(pair.channels_J), generator=torch.Generator().manual_seed(1)))
    for batch in [*data, *batches(name, seed=7)]:
        before, after = output(dense, batch), output(model, batch)
        assert float((after - before).norm() / before.norm()) < 1e-5
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    named = {name for pair in pairs for name in [pair.source, *pair.consumers]}
    assert {n.rpartition(".")[0] for n in changed} == named


def test_the_check_sees_a_wrong_pair_and_puts_the_weights_back():
    model, modules, pairs = find_pairs("gelu", batches("gelu"))
    dense = copy.deepcopy(model)
    index_C = torch.where(torch.arange(FF) < C, torch.arange(FF), -1)
    wrong = Pair("0.fc1", "rows", torch.arange(C), {"0.fc2": Consumer({"weight": 1}, index_C)})  # over a GELU
    x = batches("gelu")[0]
    with torch.no_grad():
        assert change_by_folding(pairs, modules, lambda: model(x), torch.Generator()) < 1e-6
        assert change_by_folding([wrong], modules, lambda: model(x), torch.Generator()) > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_source_is_divided_by_the_form_in_which_it_holds_its_scale():
    linear, norm, s_J = nn.Linear(3, 4), nn.LayerNorm(4), torch.tensor([2.0, 4.0])
    channels = torch.tensor([1, 3])
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    scale_source(linear, "rows", channels, s_J)
    divisor = torch.tensor([1.0, 2.0, 1.0, 4.0])
    assert_close(linear.weight.detach(), weight / divisor[:, None])
    assert_close(linear.bias.detach(), bias / divisor)
    scale_source(norm, "weight", channels, s_J)
    assert_close(norm.weight.detach(), 1 / divisor)
    nn.init.normal_(norm.weight)
    gain = 1 + norm.weight.detach()
    scale_source(norm, "one_plus_weight", channels, s_J)
    assert_close(1 + norm.weight.detach(), gain / divisor)


def test_the_scale_of_an_input_channel_is_the_one_of_its_source_channel():
    index_C = torch.tensor([1, -1, 0, 1])
    assert spread(index_C, torch.tensor([2.0, 3.0])).tolist() == [3.0, 1.0, 2.0, 3.0]


def test_parameters_are_restored_after_an_error():
    linear = nn.Linear(2, 2)
    before = linear.weight.detach().clone()
    with suppress(ZeroDivisionError), restored(linear):
        linear.weight.data.zero_()
        raise ZeroDivisionError
    assert torch.equal(linear.weight, before)
