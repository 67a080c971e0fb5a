"""Hooks: each forward, pauses, pickles, removal."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress.core import EventType

E = EventType


def test_a_hook_sees_each_forward_and_may_replace_input_and_output(recording):
    modifier, layer, seen = recording(), nn.Linear(2, 2, bias=False), []
    layer.weight.data = torch.eye(2)
    modifier.hook(layer, lambda m, args: seen.append(args[0].clone()))
    modifier.hook(layer, lambda m, args: (args[0] * 2,))
    modifier.hook(layer, lambda m, args, out: out + 1, kind="forward")
    assert layer(torch.ones(1, 2)).tolist() == [[3, 3]]
    assert seen[0].tolist() == [[1, 1]]
    assert modifier.hooked == [layer]


def test_nested_pausing_gives_back_what_was_before(recording):
    """Leaving the inner of two pauses switches hooks on again in the reference."""
    modifier, layer, calls = recording(), nn.Linear(2, 2), []
    modifier.hook(layer, lambda m, args: calls.append(1))

    def count() -> int:
        calls.clear()
        layer(torch.ones(1, 2))
        return len(calls)

    assert count() == 1
    with modifier.paused():
        assert count() == 0
        with pytest.raises(KeyError), modifier.paused():
            raise KeyError
        assert count() == 0
    assert count() == 1


def test_pausing_one_modifier_leaves_the_other(recording):
    one, two, layer, calls = recording(), recording(), nn.Linear(2, 2), []
    one.hook(layer, lambda m, args: calls.append("one"))
    two.hook(layer, lambda m, args: calls.append("two"))
    with one.paused():
        layer(torch.ones(1, 2))
    assert calls == ["two"]


def test_a_pickled_model_leaves_the_modifier_behind(recording):
    modifier, layer, calls = recording(), nn.Linear(2, 2), []
    modifier.hook(layer, lambda m, args: calls.append(1))
    copied, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    loaded(torch.ones(1, 2))
    assert calls == []
    copied(torch.ones(1, 2))
    assert calls == [1]


def test_hooks_of_some_modules_come_off(recording):
    modifier, a, b = recording(), nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (a, b, a):
        modifier.hook(module, lambda *args: None)
    assert modifier.hooked == [a, b]
    modifier.remove_hooks(a)
    assert modifier.hooked == [b]
    assert not a._forward_pre_hooks
    assert b._forward_pre_hooks
    modifier.remove_hooks()
    assert modifier.hooked == []
    assert not b._forward_pre_hooks
