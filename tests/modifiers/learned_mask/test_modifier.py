"""Learned masks: the gradient is that of the paper, weights stand still, and the masks that come out are N:M."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.qat import QATModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.record import Quantized
from tests.support.learned_mask_runs import logits_of, started
from tests.support.pruning_runs import kept_per_group
from tests.support.training_loop import network, train


def loop(model, lifecycle, steps, first=0, lr=0.05):
    """The training loop, with an optimizer made after the logits are there."""
    return train(
        model, [], steps, first=first, optimizer=torch.optim.Adam(model.parameters(), lr=lr), lifecycle=lifecycle
    )


def test_a_model_in_eval_mode_learns_masks_too():
    """Lightning leaves modes alone, and from_pretrained returns a model in eval mode."""
    model = network().eval()
    _, lifecycle = started(model)
    lifecycle.emit(State(model=model), Event(EventType.BATCH_START, 0, 0))
    model(torch.randn(3, 16)).square().sum().backward()
    assert logits_of(model[0]).logits.grad.abs().sum() > 0


def planted(seed: int = 0) -> tuple[nn.Sequential, torch.Tensor]:
    """Inputs in pairs of copies: two of four columns are enough, but not the two with the largest weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 6, bias=False))
    with torch.no_grad():
        weight = model[0].weight.view(6, 8, 4)
        weight.copy_(torch.randn(6, 8, 4))
        weight[..., :2] *= 2  # the largest, on inputs that are hardly ever there
    scale = torch.tensor([0.05, 0.05, 1.0, 1.0]).repeat(8)
    return model, scale


def fitted(modifier, steps=200) -> tuple[nn.Sequential, float]:
    """Trained to keep the function of the dense model; its loss on other inputs in the end."""
    model, scale = planted()
    dense = copy.deepcopy(model)
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        x = scale * torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        lifecycle.emit(state, Event(EventType.BATCH_START, step, step))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), dense(x).detach())
        lifecycle.emit(state.but(loss=loss), Event(EventType.LOSS_CALCULATED, step, step))
        loss.backward()
        lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, step, step))
        optimizer.step()
        lifecycle.emit(state, Event(EventType.OPTIM_POST_STEP, step + 1, step))
        lifecycle.emit(state, Event(EventType.BATCH_END, step + 1, step))
    lifecycle.emit(state, Event(EventType.TRAINING_END))
    lifecycle.finalize(state)
    x = scale * torch.randn(512, 32, generator=torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return model, nn.functional.mse_loss(model(x), dense(x)).item()


def test_a_learned_mask_beats_that_of_magnitude_with_the_weights_as_they_were():
    model, learned = fitted(LearnedMaskModifier(end=200))
    _, magnitude = fitted(MagnitudePruningModifier(mask_structure="2:4"), steps=0)
    assert learned < 0.05 * magnitude
    dense = planted()[0][0].weight
    kept = model[0].weight != 0
    assert (kept_per_group(model[0].weight, 4) == 2).all()
    assert torch.equal(model[0].weight[kept], dense[kept])
    assert type(model[0]) is nn.Linear
    assert list(dict(model.named_parameters())) == ["0.weight"]


@pytest.mark.parametrize("structure", ["1:4", "2:4", "4:8"])
def test_other_patterns(structure):
    model = network()
    modifier, lifecycle = started(model, mask_structure=structure, end=3)
    loop(model, lifecycle, 5)
    n, m = modifier.pattern
    assert (kept_per_group(model[0].weight.detach(), m) == n).all()


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 2), nn.Linear(8 * 9, 8)

    def forward(self, x):
        return self.head(self.conv(x.view(-1, 4, 2, 2).repeat(1, 1, 2, 2)).flatten(1))


def test_convolutions_are_masked_as_matrices():
    torch.manual_seed(0)
    model = Conv()
    _, lifecycle = started(model, targets=["conv"], end=3)
    loop(model, lifecycle, 5)
    assert (kept_per_group(model.conv.weight.detach().flatten(1), 4) == 2).all()


@pytest.mark.parametrize(("freeze", "moved"), [("all", []), ("targets", [1, 2, 3]), ("nothing", [0, 1, 2, 3])])
def test_what_is_frozen_stands_still_and_trains_after_the_window(freeze, moved):
    model, before = network(), list(network().parameters())
    after: dict[int, list[int]] = {}
    _, lifecycle = started(model, targets=["0"], freeze=freeze, end=5)

    def original():
        return [model[0].parametrizations.weight.original, model[0].bias, model[2].weight, model[2].bias]

    def look(step):
        after[step] = [i for i, (a, b) in enumerate(zip(original(), before, strict=True)) if not torch.equal(a, b)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, [], 8, optimizer=optimizer, lifecycle=lifecycle, after_step=look)
    assert after[4] == moved
    assert after[8] == [0, 1, 2, 3]
    assert (kept_per_group(model[0].weight.detach(), 4) == 2).all()


def test_before_its_start_the_model_trains_as_it_is():
    model, plain = network(), network()
    _, lifecycle = started(model, start=4, end=6)
    loop(model, lifecycle, 3)
    loop(plain, Lifecycle([LearnedMaskModifier(start=90, end=91)]), 0)
    train(plain, [MagnitudePruningModifier()], 3, optimizer=torch.optim.Adam(plain.parameters(), lr=0.05))
    assert torch.equal(model[0].weight, plain[0].weight)


def test_checkpoints_have_dense_keys():
    model, keys = network(), list(network().state_dict())
    _, lifecycle = started(model)
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == len(keys) + 2
    loop(model, lifecycle, 3)
    learned = logits_of(model[0]).logits.detach().clone()
    other = network(seed=4)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].parametrizations.weight.original, other[0].weight)
    assert torch.equal(logits_of(model[0]).logits, learned)
    network().load_state_dict(model.state_dict())
    assert list(copy.deepcopy(model).state_dict()) == keys


@pytest.mark.parametrize("stop", [2, 5, 7, 9])
def test_a_resumed_run_ends_with_the_same_bits(stop):
    def build():
        return [LearnedMaskModifier(start=1, end=7, regularization=1e-3)]

    def made(model):
        lifecycle = Lifecycle(build())
        lifecycle.initialize(State(model=model))
        return lifecycle, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01)

    whole, half, resumed = network(), network(), network(seed=5)
    lifecycle, optimizer = made(whole)
    train(whole, [], 11, optimizer=optimizer, lifecycle=lifecycle)
    lifecycle, first = made(half)
    train(half, [], stop, optimizer=first, lifecycle=lifecycle)
    saved = copy.deepcopy((half.state_dict(), first.state_dict(), lifecycle.state_dict()))
    lifecycle, second = made(resumed)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    lifecycle.load_state_dict(saved[2])
    train(resumed, [], 11, first=stop, optimizer=second, lifecycle=lifecycle)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (kept_per_group(resumed[0].weight.detach(), 4) == 2).all()


def test_quantized_after_training_its_zeros_stay():
    model = network()
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with pytest.warns(UserWarning, match="no training step was made, so that the masks are the initial ones"):
        compress(model, [LearnedMaskModifier(end=9), GPTQModifier(scheme="W4A16", group_size=16)], data)
    assert list(Quantized.find(model)) == ["0", "2"]
    assert (kept_per_group(model[0].weight.detach(), 4) <= 2).all()
    assert (model[0].weight == 0).float().mean() >= 0.5


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("gradient", ["ste", "lsq"])
def test_training_through_quantization_may_follow(order, gradient):
    model, keys = network(), list(network().state_dict())
    both = [LearnedMaskModifier(end=3), QATModifier(scheme="W4A16", group_size=8, gradient=gradient, start=3)]
    lifecycle = Lifecycle([both[i] for i in order])
    lifecycle.initialize(State(model=model))
    loop(model, lifecycle, 6, lr=0.01)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        trained = model(torch.ones(1, 16))
    lifecycle.finalize(State(model=model))
    assert (kept_per_group(model[0].weight.detach(), 4) <= 2).all()
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert_close(model(torch.ones(1, 16)), trained, rtol=0, atol=0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_quantization_at_the_same_time_is_refused(order):
    both = [LearnedMaskModifier(end=3), QATModifier(scheme="W4A16", group_size=8)]
    with pytest.raises(ValueError, match="'0', which is fake-quantized at the same time: let quantization start where"):
        train(network(), [both[i] for i in order], 2)


def test_another_that_chooses_masks_is_refused_at_setup():
    both = [LearnedMaskModifier(end=6), MagnitudePruningModifier(start=0, end=6, targets=["2"])]
    with pytest.raises(ValueError, match="choose masks while training for '2', LearnedMask.*MagnitudePruning"):
        Lifecycle(both).initialize(State(model=network()))


def test_a_compiled_model():
    model, plain = network(), network()
    _, lifecycle = started(plain)
    loop(plain, lifecycle, 4)
    _, lifecycle = started(model)
    loop(torch.compile(model, backend="eager"), lifecycle, 4)
    assert_close(logits_of(model[0]).logits, logits_of(plain[0]).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "masks are learned inside a window of training; give end"),
        ({"end": 4, "mask_structure": "channel"}, "masks are learned for N:M"),
        ({"end": 4, "mask_structure": "4:2"}, "expected 0 < N < M"),
        ({"end": 4, "mask_structure": "8:16"}, "has 12870 patterns, each with a logit of its own"),
        ({"end": 4, "tau": (1.0, 0.0)}, "tau.1=0.0: Input should be greater than 0"),
        ({"end": 4, "freeze": "some"}, "freeze='some'"),
        ({"end": 4, "prior_strengh": 1}, "did you mean 'prior_strength'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedMaskModifier(**arguments)


def test_weights_that_cannot_have_a_mask_are_named():
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"does not divide the columns of 0 \(10\)"):
        started(model, targets=["0"])
    with pytest.raises(ValueError, match=r"cannot learn a mask for 1 \(LayerNorm\)"):
        started(model, targets=["1"])
    model[3].weight = model[2].weight
    with pytest.raises(ValueError, match="the weight of '2' is shared with '3.weight'"):
        started(model, targets=["2"])
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())


def test_reentrant_gradient_checkpointing_trains_the_same_masks(tmp_path):
    """Its first pass runs without gradients, and is the soft mask's all the same; validation sees the hard one."""
    from torch.utils.checkpoint import checkpoint

    import lightning_compress
    from tests.support.training_runs import Regression, Sums, quiet

    def losses(reentrant):
        class Checkpointed(Regression):
            def forward(self, x):
                x = x.requires_grad_(torch.is_grad_enabled())
                return checkpoint(self.model, x, use_reentrant=True) if reentrant else self.model(x)

            def training_step(self, batch, batch_idx):
                told.append(float((loss := self.error(batch)).detach()))
                return loss

            def on_validation_batch_end(self, *args):
                told.append(bool((self.model[0].weight == 0).float().mean() == 0.5))

        told = []
        torch.manual_seed(0)
        masks = lightning_compress.LearnedMaskModifier(start=0, end=6, init_std=1.0, ignore=["2"])
        callback = lightning_compress.CompressionCallback(masks, evaluate=False)
        folder = tmp_path / str(reentrant)
        options = {"max_epochs": 2, "num_sanity_val_steps": 2, "val_check_interval": 2}
        quiet(folder, callback, **options).fit(Checkpointed(), Sums(shuffle=False))
        return told

    plain = losses(reentrant=False)
    assert plain.count(True) == 16 + 2  # with those before training
    assert losses(reentrant=True) == plain
