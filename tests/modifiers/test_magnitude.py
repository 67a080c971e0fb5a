"""Magnitude and constant pruning: zeros come as scheduled and stay, whatever the optimizer does."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.constant import ConstantPruningModifier
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.oneshot import compress
from tests.support.architecture_models import ARCHITECTURES
from tests.support.training_loop import network, train

OPTIMIZERS = {
    "sgd momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def sparsity(module: nn.Module) -> float:
    return (module.weight == 0).float().mean().item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparsity_follows_the_cubic_schedule_and_zeros_survive_every_step(optimizer):
    model, seen, masks = network(), {}, []
    modifier = MagnitudePruningModifier(start=2, end=12, init_sparsity=0.1, final_sparsity=0.8, update=2)

    def look(step: int) -> None:
        seen[step] = sparsity(model[0])
        masks.append(model[0].weight == 0)

    train(model, [modifier], 20, optimizer=OPTIMIZERS[optimizer](model.parameters()), after_step=look)
    weights = model[0].weight.numel()
    for step, value in seen.items():
        last_update = min(12, (step - 1) // 2 * 2)  # the step ran after the update at or before it
        if step <= 2:
            expected = 0.0
        else:
            p = (last_update - 2) / 10
            expected = int((0.1 + 0.7 * (1 - (1 - p) ** 3)) * weights + 1e-9) / weights
        assert value == pytest.approx(expected), step
    assert seen[20] == pytest.approx(int(0.8 * weights) / weights)
    assert all((later | ~earlier).all() for earlier, later in pairwise(masks)), "masks only grow"


def test_masks_hold_under_gradient_accumulation():
    model = network()
    train(model, [MagnitudePruningModifier(start=0, end=3, final_sparsity=0.5)], 6, accumulate=3)
    assert sparsity(model[2]) == 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("structure", "unit"), [("block 4x2", (4, 2)), ("channel", (1, 16)), ("unstructured", (1, 1))], ids=str
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_structures_grow_along_the_schedule_under_momentum_and_decay(optimizer, structure, unit, accumulate):
    model, seen, units = network(), [], 32 * 16 // (unit[0] * unit[1])

    def look(step: int) -> None:
        tiles = (model[0].weight == 0).reshape(32 // unit[0], unit[0], 16 // unit[1], unit[1]).float().mean((1, 3))
        assert set(tiles.unique().tolist()) <= {0.0, 1.0}
        seen.append(int(tiles.sum()))

    modifier = MagnitudePruningModifier(targets=["0"], start=1, end=7, mask_structure=structure, schedule="cosine")
    moving = OPTIMIZERS[optimizer](model.parameters())
    train(model, [modifier], 9, accumulate=accumulate, optimizer=moving, after_step=look)
    expected = [0.5 * (1 - math.cos(math.pi * min(max(step - 1, 0) / 6, 1))) / 2 for step in range(9)]
    assert seen == [int(share * units + 1e-9) for share in expected]


def test_the_smallest_units_go():
    """The mean of a unit counts, not its largest weight."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 0, 0, 0], [3, 3, 3, 3], [1, 1, 1, 1], [2, 2, 2, 2]]))
    modifier = MagnitudePruningModifier(mask_structure="channel", final_sparsity=0.5)
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.TRAINING_END))
    assert (model[0].weight != 0).any(1).tolist() == [True, True, False, False]


def test_a_mask_is_not_chosen_again_where_the_schedule_stands_still(monkeypatch):
    chosen = []
    original = MagnitudePruningModifier.masks_at

    def counting(self, curve, *rest):
        chosen.append(curve)
        return original(self, curve, *rest)

    monkeypatch.setattr(MagnitudePruningModifier, "masks_at", counting)
    train(network(), [MagnitudePruningModifier(start=0, schedule="constant")], 10)
    assert chosen == [1.0]


def test_two_of_four_is_there_from_the_first_step():
    model = network()
    train(model, [MagnitudePruningModifier(start=0, mask_structure="2:4")], 4)
    assert ((model[0].weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_global_ranking_prunes_where_weights_are_small():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(100)
    train(model, [MagnitudePruningModifier(start=0, end=1, final_sparsity=0.5, scope="global")], 2)
    total = model[0].weight.numel() + model[2].weight.numel()
    zeros = (model[0].weight == 0).sum() + (model[2].weight == 0).sum()
    assert zeros.item() == total // 2
    assert sparsity(model[2]) < 0.05 < sparsity(model[0])


def test_without_a_window_it_prunes_once_after_training():
    model = network()
    before = model[0].weight.detach().clone()
    modifier = MagnitudePruningModifier(final_sparsity=0.5)
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.TRAINING_END))
    lifecycle.finalize(state)
    kept = model[0].weight != 0
    assert kept.float().mean() == 0.5
    assert before.abs()[kept].min() >= before.abs()[~kept].max()
    assert_close(model[0].weight[kept], before[kept], rtol=0, atol=0)
    assert [row.sparsity for row in state.ledger] == [0.5, 0.5]


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_ends_with_the_same_bits(stop):
    def build():
        return [
            MagnitudePruningModifier(start=1, end=8, update=3, final_sparsity=0.7, targets=["0"]),
            ConstantPruningModifier(targets=["2"]),
        ]

    def prepare(model):
        with torch.no_grad():
            model[2].weight[:, ::2] = 0
        return model

    whole = prepare(network())
    train(whole, build(), 12)

    half = prepare(network())
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    lifecycle = train(half, build(), stop, optimizer=optimizer)
    saved = (half.state_dict(), optimizer.state_dict(), lifecycle.state_dict())

    resumed = network(seed=5)
    again = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    lifecycle = Lifecycle(build())
    lifecycle.initialize(State(model=resumed))
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    lifecycle.load_state_dict(saved[2])
    train(resumed, [], 12, first=stop, optimizer=again, lifecycle=lifecycle)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first", ["magnitude", "constant"])
def test_in_one_shot_a_quantizer_behind_it_keeps_the_zeros(first):
    """No Trainer: magnitude pruning prunes, constant pruning leaves a pruned model as it is and reports its zeros."""
    model, data = network(), [torch.randn(32, network()[0].in_features)]
    if first == "constant":
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight[:, ::2] = 0
    pruner = MagnitudePruningModifier(final_sparsity=0.5) if first == "magnitude" else ConstantPruningModifier()
    grid = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}}
    dense = copy.deepcopy(model)
    ledger = compress(model, [pruner, GPTQModifier(config_groups=grid)], data)
    for layer, before in ((model[0], dense[0]), (model[2], dense[2])):
        gone = before.weight == 0 if first == "constant" else before.weight.abs() <= before.weight.abs().median()
        assert not layer.weight[gone].any()
        assert not torch.equal(layer.weight, before.weight)
    rows = [row for row in ledger if row.technique in ("magnitude", "constant pruning")]
    assert [row.sparsity >= 0.5 for row in rows] == [True, True]


@pytest.mark.parametrize(
    ("structure", "scope"), [("unstructured", "layer"), ("unstructured", "global"), ("2:4", "layer")]
)
def test_every_expert_of_a_mixture_is_pruned_after_training(structure, scope):
    model = ARCHITECTURES["mixtral"].build()
    dense = copy.deepcopy(model.state_dict())
    modifier = MagnitudePruningModifier(ignore=["lm_head"], mask_structure=structure, scope=scope)
    rows = [row for row in compress(model, modifier) if ".experts." in row.module]
    layers = model.config.num_hidden_layers
    assert len(rows) == layers * 4 * 3
    for name, weight in model.state_dict().items():
        if ".experts." in name:
            remaining = weight != 0
            assert torch.equal(weight[remaining], dense[name][remaining])
            if scope == "layer":  # each of the four experts alone
                assert (remaining.flatten(1).float().mean(1) == 0.5).all()
            assert remaining.float().mean() < 0.7
