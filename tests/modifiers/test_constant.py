"""Constant pruning holds the zeros that are there."""

import torch

from lightning_compress.modifiers.constant import ConstantPruningModifier
from tests.support.training_loop import network, train


def test_constant_pruning_holds_zeros_and_lets_them_go_at_its_end():
    model = network()
    with torch.no_grad():
        model[0].weight[::2] = 0
    zeros = model[0].weight == 0
    held: list[bool] = []
    train(
        model,
        [ConstantPruningModifier(end=5)],
        8,
        after_step=lambda step: held.append(bool((model[0].weight[zeros] == 0).all())),
    )
    assert held == [True] * 5 + [False] * 3
