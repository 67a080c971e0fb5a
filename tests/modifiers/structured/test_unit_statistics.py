"""What batches say of units, against gates and inputs computed by hand."""

import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, State
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.structure_runs import initialized, perceptron
from tests.support.training_loop import train


def test_taylor_keeps_what_the_loss_needs():
    """A neuron whose output nobody changes the loss by goes first, large as it may be."""
    torch.manual_seed(0)
    model = perceptron()
    idle = torch.tensor([3, 7, 11, 30])
    with torch.no_grad():
        model[0].weight[idle] = 0.5
        model[0].bias[idle] = -100.0  # never active: no gradient
    kept_bias = model[0].bias.detach()
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.125, start=2, importance="taylor")
    train(model, [modifier], 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    assert model[0].out_features == 28
    assert model[0].bias.min() > -50
    assert kept_bias.shape == (32,)


def test_taylor_is_the_squared_derivative_by_a_gate():
    model = perceptron()
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.5, start=5, importance="taylor", input_shape=[16]
    )
    lifecycle = initialized(model, modifier)
    x, y = torch.randn(8, 16), torch.randint(0, 8, (8,))
    gates_in, gates_out = torch.ones(32, requires_grad=True), torch.ones(32, requires_grad=True)
    hidden = torch.relu(nn.functional.linear(x, model[0].weight * gates_in[:, None], model[0].bias))
    hidden = torch.relu(nn.functional.linear(hidden, model[2].weight * gates_out, model[2].bias))
    nn.functional.cross_entropy(model[4](hidden), y).backward()
    expected = gates_in.grad.square() + gates_out.grad.square()
    state = State(model=model)
    lifecycle.emit(state, Event(EventType.BATCH_START, 0))
    lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, 0))
    assert_close(modifier._statistics.state_dict()["sums"]["0"].float(), expected)


def test_activations_rank_neurons_while_training_and_validation_does_not_count():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:16] *= 0.01  # quiet, though wide awake further on
        model[0].bias[:16] = 0
        model[2].weight[:, :16] *= 100
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.5, start=1, importance="activation", input_shape=[16]
    )
    loud = model[0].weight.detach()[16:].clone()
    lifecycle = initialized(model, modifier)
    model.eval()(torch.randn(4, 16))
    assert not modifier._statistics.state_dict()["seen"]
    train(model, [modifier], 2, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), lifecycle=lifecycle)
    assert torch.equal(model[0].weight, loud)
    assert not modifier.hooked
