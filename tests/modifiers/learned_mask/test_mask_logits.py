"""The parametrization of a weight whose mask is learned."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, State
from lightning_compress.modifiers.learned_mask.gumbel import gumbel, hard_mask, patterns
from tests.support.learned_mask_runs import logits_of, started
from tests.support.training_loop import network


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_that_of_the_softmax_by_hand(accumulate):
    """dL/dl_k = kappa / tau p_k (a_k - sum_j p_j a_j), a = S dL/dm, dL/dm = (dL/dW') W - 2 lambda W^2 m."""
    model, strength = nn.Sequential(nn.Linear(16, 8)), 0.01
    W, b = model[0].weight.detach().double().clone(), model[0].bias.detach().double()
    _, lifecycle = started(model, regularization=strength)
    logits, state, S = logits_of(model[0]), State(model=model), patterns(2, 4).double()
    expected = torch.zeros(8, 4, 6, dtype=torch.float64)
    for micro in range(accumulate):
        x, y = torch.randn(12, 16), torch.randint(0, 8, (12,))
        clock = {"global_step": 30, "global_batch": 7 + micro, "batches_per_step": accumulate}
        lifecycle.emit(state, Event(EventType.BATCH_START, **clock))
        loss = nn.functional.cross_entropy(model(x), y) / accumulate
        lifecycle.emit(state.but(loss=loss), Event(EventType.LOSS_CALCULATED, **clock))
        loss.backward()
        lifecycle.emit(state, Event(EventType.BATCH_END, **clock))

        tau, kappa = 4 + 0.3 * (0.05 - 4), 100 + 0.3 * 400
        g = gumbel((8, 4, 6), logits.seed, torch.device("cpu")).double()
        p = ((kappa * logits.logits.detach().double() + g) / tau).softmax(-1)
        m = (p @ S).flatten(1)
        masked = (W * m).requires_grad_()
        (nn.functional.cross_entropy(x.double() @ masked.t() + b, y) / accumulate).backward()
        gate = masked.grad * W - 2 * strength * W.square() * m / accumulate
        a = gate.reshape(8, 4, 4) @ S.t()
        expected += kappa / tau * p * (a - (p * a).sum(-1, keepdim=True))
    assert_close(logits.logits.grad.double(), expected, rtol=1e-3, atol=1e-6)


def test_noise_is_new_in_every_batch_and_the_same_in_a_repeated_forward():
    model = network()
    _, lifecycle = started(model)
    x, seen = torch.randn(3, 16), []
    for number in range(3):
        lifecycle.emit(State(model=model), Event(EventType.BATCH_START, number, number))
        seen.append(model(x).detach())
        assert torch.equal(model(x).detach(), seen[-1])
        lifecycle.emit(State(model=model), Event(EventType.BATCH_END, number, number))
    assert not torch.equal(seen[0], seen[1])
    with torch.no_grad():  # validation, whatever mode the model is in
        W = hard_mask(logits_of(model[0]).logits, patterns(2, 4)) * model[0].parametrizations.weight.original
        assert torch.equal(model[0].weight, W)
