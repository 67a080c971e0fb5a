"""The random state of a process as plain values, and back."""

import random

import numpy
import torch

from lightning_compress.training import random_state
from lightning_compress.training.checks import check_plain


def draw():
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


def test_all_streams_go_on_where_they_were_collected():
    state = random_state.collect()
    check_plain(state, "random")
    first = draw()
    draw()
    random_state.restore([state])
    assert draw() == first
    assert random_state.collect_all(state) == [state]


def test_a_rank_without_a_state_keeps_its_own():
    state = random_state.collect()
    first = draw()
    random_state.restore([state])
    random_state.restore([])
    assert draw() == first


def test_a_loaded_state_is_restored_once():
    loaded = random_state.LoadedRandomState()
    loaded.restore()  # nothing was loaded
    loaded.states = [random_state.collect()]
    first = draw()
    loaded.restore()
    assert draw() == first
    second = draw()
    loaded.restore()
    assert draw() != second
