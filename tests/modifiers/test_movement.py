"""Movement pruning: scores are those of the paper, masks are worn and taken off without losing a weight."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.movement import MovementPruningModifier, soft_step
from lightning_compress.modifiers.qat import QATModifier
from tests.support.training_loop import network, train


def sparsity(module: nn.Module) -> float:
    return (module.weight == 0).float().mean().item()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the training loop of the tests feeds."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, 16, generator=generator), torch.randint(0, 8, (32,), generator=generator)


def slow_movement(model: nn.Sequential, steps: int, end: int, final: float, lr: float = 0.1) -> list[torch.Tensor]:
    """The paper read literally: W and S are leaves, W M(S) is what the model computes with; plain SGD on W."""
    weights = [model[0].weight.detach().double(), model[2].weight.detach().double()]
    biases = [model[0].bias.detach().double(), model[2].bias.detach().double()]
    scores = [torch.zeros_like(W) for W in weights]
    masks = [torch.ones_like(W) for W in weights]
    for step in range(steps):
        gone = final * (1 - (1 - min(step / end, 1)) ** 3)
        if step <= end:
            for k, (W, S) in enumerate(zip(weights, scores, strict=True)):
                values = (S if step else W.abs()).flatten().tolist()
                ranked = sorted(range(S.numel()), key=values.__getitem__)
                masks[k] = torch.ones(W.numel(), dtype=torch.float64)
                masks[k][ranked[: int(gone * W.numel() + 1e-9)]] = 0
                masks[k] = masks[k].reshape(W.shape)
        x, y = batch(step)
        leaves = [W.clone().requires_grad_() for W in weights]
        gates = [M.clone().requires_grad_() for M in masks]  # dL/dM = (dL/dW') W: the gradient of S
        offsets = [b.clone().requires_grad_() for b in biases]
        hidden = torch.relu(x.double() @ (leaves[0] * gates[0]).t() + offsets[0])
        nn.functional.cross_entropy(hidden @ (leaves[1] * gates[1]).t() + offsets[1], y).backward()
        for k in range(2):
            weights[k] -= lr * leaves[k].grad
            biases[k] -= lr * offsets[k].grad
            if step < end:
                scores[k] -= gates[k].grad
    return [W * M for W, M in zip(weights, masks, strict=True)]


@pytest.mark.parametrize("steps", [5, 9, 14])
def test_training_goes_as_the_paper_says(steps):
    model = network()
    expected = slow_movement(network(), steps, end=10, final=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modifier = MovementPruningModifier(end=10, final_sparsity=0.7)
    train(model, [modifier], steps, optimizer=optimizer)
    for layer, W in zip((model[0], model[2]), expected, strict=True):
        assert_close(layer.weight.double(), W, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.weight == 0, W == 0)


def test_weights_come_back_as_they_were():
    """Adam and decay would move them while they sleep; they begin again where they stopped."""
    model, woken = network(), []
    modifier = MovementPruningModifier(end=40, final_sparsity=0.6, init_sparsity=0.5, schedule="linear")
    slept = torch.zeros(32, 16)

    def look(step: int) -> None:
        nonlocal slept
        asleep, mask = modifier._asleep["0"], modifier._weights.masks["0"]
        still, awake = (slept != 0) & ~mask, (slept != 0) & mask
        assert torch.equal(asleep[still], slept[still])
        assert (model[0].weight[~mask] == 0).all()
        assert ((model[0].weight - slept).abs()[awake] < 0.02).all(), "one step of Adam away from where it slept"
        woken.append(int(awake.sum()))
        slept = asleep.clone()

    train(
        model,
        [modifier],
        30,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        after_step=look,
    )
    assert sum(woken) > 10
    assert sparsity(model[0]) >= 0.5


def test_large_weights_that_move_to_zero_go_and_small_ones_that_grow_stay():
    """Fine-tuning onto another task: the columns that were useful before are large, and useless now."""

    def pretrained() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 4, bias=False))
        with torch.no_grad():
            model[0].weight.mul_(0.2)
            model[0].weight[:, :8] += 0.6
        return model

    truth = torch.zeros(4, 16)
    truth[:, 8:] = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def tuned(modifier) -> float:
        model = pretrained()
        lifecycle, state = Lifecycle([modifier]), State(model=model)
        lifecycle.initialize(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(120):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            lifecycle.emit(state, Event(EventType.BATCH_START, step))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x @ truth.t()).backward()
            lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, step))
            optimizer.step()
            lifecycle.emit(state, Event(EventType.OPTIM_POST_STEP, step + 1))
            lifecycle.emit(state, Event(EventType.BATCH_END, step + 1))
        assert sparsity(model[0]) == 0.5
        return (model[0].weight - truth).square().mean().item()

    schedule = {"start": 0, "end": 40, "final_sparsity": 0.5}
    assert tuned(MovementPruningModifier(**schedule)) < 0.3 * tuned(MagnitudePruningModifier(**schedule))


@pytest.mark.parametrize("structure", ["2:4", "block 4x2", "channel"])
def test_structures(structure):
    model = network()
    train(model, [MovementPruningModifier(targets=["0"], end=6, mask_structure=structure)], 8)
    zeros = model[0].weight == 0
    assert zeros.float().mean() == 0.5
    if structure == "2:4":
        assert (zeros.reshape(-1, 4).sum(1) == 2).all()
    else:
        rows, columns = (4, 2) if structure == "block 4x2" else (1, 16)
        tiles = zeros.reshape(32 // rows, rows, 16 // columns, columns).float().mean((1, 3))
        assert set(tiles.unique().tolist()) == {0.0, 1.0}


def test_a_global_ranking():
    model = network()
    train(model, [MovementPruningModifier(end=6, final_sparsity=0.7, scope="global")], 8)
    total = model[0].weight.numel() + model[2].weight.numel()
    zeros = (model[0].weight == 0).sum() + (model[2].weight == 0).sum()
    assert zeros.item() == int(0.7 * total)
    assert sparsity(model[0]) != sparsity(model[2])


# -- soft -------------------------------------------------------------------------------------------------------------


def test_the_soft_step_descends_the_regularizer():
    S = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    u = torch.randn(5, 7, dtype=torch.float64)
    ((u * S).sum() + 0.3 * S.sigmoid().sum()).backward()
    assert_close(soft_step(S.detach(), u, 0.05, 0.3), S.detach() - 0.05 * S.grad)


def test_soft_prunes_more_with_more_regularization():
    def share(**options) -> float:
        model = network()
        soft = {"mode": "soft", "end": 60, "score_lr": 0.05, "schedule": "linear", "threshold": 0.4} | options
        train(model, [MovementPruningModifier(**soft)], 70)
        return sparsity(model[0])

    assert 0 == share(regularization=0.0, threshold=1e-6) < share(regularization=0.5) < share(regularization=2.0) < 1


def test_soft_scores_do_not_depend_on_the_size_of_the_loss():
    small, large = (MovementPruningModifier(mode="soft", end=60) for _ in range(2))
    for step in range(5):
        moved = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        small._add("0", moved, 0.5)
        large._add("0", 4096 * moved, 0.5)
    assert_close(small._scores["0"], large._scores["0"])


def test_a_target_that_is_pruned_completely_is_a_warning():
    soft = MovementPruningModifier(mode="soft", end=20, score_lr=1.0, regularization=50.0, threshold=0.4)
    with pytest.warns(UserWarning, match="all weights of .* are zero; give less regularization"):
        train(network(), [soft], 25)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_count_once_per_step():
    whole = slow_accumulated(network())
    model = network()
    modifier = MovementPruningModifier(end=50, final_sparsity=0.5)
    train(model, [modifier], 1, accumulate=3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(modifier._scores["0"], -whole, rtol=1e-4, atol=1e-7)


def slow_accumulated(model: nn.Sequential) -> torch.Tensor:
    """(dL/dW) W of the mean of three batches, seen as one."""
    parts = [batch(i) for i in range(3)]
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    nn.functional.cross_entropy(model(x), y).backward()
    return model[0].weight.grad * model[0].weight.detach()


def test_a_step_that_was_skipped_does_not_count():
    """fp16: gradients overflowed, the optimizer did not step."""
    model = network()
    modifier = MovementPruningModifier(end=9)
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.BATCH_START))
    model(batch(0)[0]).sum().mul(float("inf")).backward()
    lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP))
    lifecycle.emit(state, Event(EventType.BATCH_END))
    assert modifier._scores == {}


def test_only_the_optimizer_that_steps_moves_scores():
    """A GAN: gradients of the other network lie around, of a loss that is not its own."""
    model = network()
    modifier = MovementPruningModifier(end=9)
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    lifecycle.emit(state, Event(EventType.BATCH_START))
    model(batch(0)[0]).sum().backward()
    lifecycle.emit(state.but(optimizer=first), Event(EventType.OPTIM_PRE_STEP))
    first.step()
    lifecycle.emit(state.but(optimizer=first), Event(EventType.OPTIM_POST_STEP, 1))
    assert list(modifier._scores) == ["0"]


# -- with others, and going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["prune", "quantize"])
@pytest.mark.parametrize("gradient", ["ste", "lsq"])
def test_beside_quantization_zeros_stay_zeros(first, gradient):
    prune = MovementPruningModifier(end=6, final_sparsity=0.5)
    quantize = QATModifier(scheme="W4A16", group_size=8, gradient=gradient)
    model = network()
    keys = list(model.state_dict())
    lifecycle = train(model, [prune, quantize] if first == "prune" else [quantize, prune], 9)
    assert list(model.state_dict()) == keys
    lifecycle.finalize(State(model=model))
    for name, mask in prune._weights.masks.items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
        assert mask.float().mean() == 0.5


def test_beside_distillation_it_ranks_by_the_gradient_of_both():
    model, alone = network(), network()
    both = [DistillationModifier(teacher=network(seed=3), weight=0.5), MovementPruningModifier(end=6)]
    train(model, both, 8)
    train(alone, [MovementPruningModifier(end=6)], 8)
    assert sparsity(model[0]) == sparsity(alone[0]) == 0.5
    assert not torch.equal(model[0].weight == 0, alone[0].weight == 0)


def test_another_that_chooses_masks_is_refused_at_setup():
    both = [MovementPruningModifier(end=6), MagnitudePruningModifier(start=0, end=6, targets=["2"])]
    with pytest.raises(ValueError, match="choose masks while training for '2', MovementPruning.*MagnitudePruning"):
        Lifecycle(both).initialize(State(model=network()))
    Lifecycle([MovementPruningModifier(end=6), MagnitudePruningModifier()]).initialize(State(model=network()))


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"final_sparsity": 0.7, "update": 2},
        {"final_sparsity": 0.5, "mask_structure": "2:4"},
        {"mode": "soft", "score_lr": 0.3, "threshold": 0.4},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(stop, options):
    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.05)

    def build():
        return [MovementPruningModifier(start=1, end=9, **options)]

    whole, half, resumed = network(), network(), network(seed=5)
    train(whole, build(), 13, optimizer=optimizer(whole))
    first, second = optimizer(half), optimizer(resumed)
    stopped = train(half, build(), stop, optimizer=first)
    lifecycle = Lifecycle(build())
    lifecycle.initialize(State(model=resumed))
    resumed.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    lifecycle.load_state_dict(stopped.state_dict())
    train(resumed, [], 13, first=stop, optimizer=second, lifecycle=lifecycle)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (resumed[0].weight == 0).any()


def test_a_weight_that_shrinks_under_its_mask_is_named():
    model = network()
    lifecycle = train(model, [MovementPruningModifier(end=6)], 2)
    model[0].weight = nn.Parameter(model[0].weight.detach()[:16])
    with pytest.raises(ValueError, match=r"mask of '0' is \(32, 16\), and its weight is \(16, 16\) now"):
        lifecycle.emit(State(model=model), Event(EventType.BATCH_START, 2, 2))


def test_the_ledger_says_what_was_done():
    model = network()
    lifecycle = train(model, [MovementPruningModifier(end=4, final_sparsity=0.75)], 6)
    state = State(model=model)
    lifecycle.emit(state, Event(EventType.TRAINING_END))
    lifecycle.finalize(state)
    assert [(row.module, row.technique, row.sparsity, row.params) for row in state.ledger] == [
        ("0", "movement", 0.75, 512),
        ("2", "movement", 0.75, 256),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a window of training"),
        ({"start": None, "end": 4}, "needs a window of training"),
        ({"end": 4, "mode": "soft", "final_sparsity": 0.6}, "final_sparsity would do nothing with mode='soft'"),
        ({"end": 4, "threshold": 0.2}, "threshold would do nothing with mode='hard': the schedule decides"),
        ({"end": 4, "mode": "soft", "threshold": 1.0}, "threshold=1.0: Input should be less than 1"),
        ({"end": 4, "mode": "firm"}, "mode='firm'"),
        ({"end": 4, "final_sparsity": 1.0}, "final_sparsity=1.0: Input should be less than 1"),
        ({"end": 4, "mask_structure": "2:4", "final_sparsity": 0.7}, "has sparsity 0.5, but 0.7 was asked for"),
        ({"end": 4, "update": 9}, "update=9.0 is larger than the window"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MovementPruningModifier(**arguments)


def test_a_width_that_the_pattern_does_not_divide_is_refused_before_training():
    modifier = MovementPruningModifier(end=4, mask_structure="2:4", targets=["0"])
    with pytest.raises(ValueError, match=r"does not fit: 0 \(2:4 does not divide 10 columns"):
        Lifecycle([modifier]).initialize(State(model=nn.Sequential(nn.Linear(10, 4))))


@pytest.mark.parametrize(("mode", "instead"), [("hard", "pruned by magnitude"), ("soft", "they were not pruned")])
def test_a_target_that_no_gradient_reaches_is_named(mode, instead):
    model = network()
    model[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"no gradient reached 0 inside the window .*{instead}"):
        train(model, [MovementPruningModifier(end=4, mode=mode)], 6)
    assert ((model[0].weight == 0).float().mean() == 0.5) == (mode == "hard")
