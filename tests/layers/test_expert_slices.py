"""Steps of single experts: values and gradients by slices, dense keys, everything as before in the end."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.layers.dense_keys import original_weight, parametrization_of, put_on, take_off, unparametrize
from lightning_compress.layers.expert_slices import ExpertSlices, set_aside
from lightning_compress.layers.split_experts import fused_experts, is_split, join, split
from tests.support.architecture_models import ARCHITECTURES

PATH = "model.layers.0.mlp.experts"
BATCH = ARCHITECTURES["mixtral"].batches()[0]


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = nn.Parameter(torch.tensor(factor)), 0

    def forward(self, weight):
        self.calls += 1
        return self.factor * weight


def made(scale=(("1.up_proj", 2.0), ("3.down_proj", -1.0))):
    """The model, and the experts that have a step."""
    model = ARCHITECTURES["mixtral"].build()
    split(model)
    linears = {name: model.get_submodule(f"{PATH}.{name}") for name, _ in scale}
    for name, factor in scale:
        put_on(linears[name], Scaled(factor))
    join(model)
    return model, linears


def by_hand():
    model = ARCHITECTURES["mixtral"].build()
    home = model.get_submodule(PATH)
    inner = home.gate_up_proj.shape[1] // 2
    with torch.no_grad():
        home.gate_up_proj[1, inner:] *= 2
        home.down_proj[3] *= -1
    return model


def test_values_are_those_of_the_steps_computed_once_for_a_call():
    model, linears = made()
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, by_hand()(**BATCH).logits)
        assert torch.equal(linears["1.up_proj"].weight, 2 * original_weight(linears["1.up_proj"]))
    step = parametrization_of(linears["1.up_proj"], Scaled)
    step.calls = 0
    model(**BATCH)
    assert step.calls == 1


def test_with_hooks_on_inputs_it_runs_expert_by_expert_with_the_same_values_and_gradients():
    gradients, logits = [], []
    for watched in (False, True):
        model, linears = made()
        calls = []
        if watched:
            for linear in set_aside(model.get_submodule(PATH)):
                linear.register_forward_pre_hook(lambda module, x, calls=calls: calls.append(module))
        out = model(**BATCH, labels=BATCH["input_ids"])
        out.loss.backward()
        logits.append(out.logits)
        gradients.append({name: p.grad for name, p in model.named_parameters() if PATH in name})
        assert bool(calls) == watched
        assert all(linear.value is None for linear in set_aside(model.get_submodule(PATH)))
    assert_close(*logits, rtol=0, atol=1e-5)
    assert_close(*gradients, rtol=1e-4, atol=1e-6)
    factors = [gradient for name, gradient in gradients[0].items() if name.endswith("factor")]
    assert len(factors) == 2
    assert all(gradient != 0 for gradient in factors)


def test_state_dicts_are_dense_and_load():
    dense, (model, _) = ARCHITECTURES["mixtral"].build(), made()
    state = model.state_dict()
    assert list(state) == list(dense.state_dict())
    assert set(state._metadata) == set(dense.state_dict()._metadata)
    changed = {name: value + 1 for name, value in state.items()}
    model.load_state_dict(changed)
    assert torch.equal(model.state_dict()[f"{PATH}.gate_up_proj"], changed[f"{PATH}.gate_up_proj"])
    assert [s.factor.item() for s in model.modules() if isinstance(s, Scaled)] == [2.0, -1.0]


@pytest.mark.parametrize("leave", [True, False])
def test_the_last_step_that_comes_off_brings_everything_back(leave):
    model, linears = made()
    home = model.get_submodule(PATH)
    assert not is_split(home)
    assert PATH in fused_experts(model)
    assert split(model) == ["model.layers.1.mlp.experts"]  # the steps of the others stay
    join(model)
    parameters = dict(home.named_parameters())
    take_off(linears["1.up_proj"], Scaled, leave)
    assert parametrization_of(linears["1.up_proj"], Scaled) is None
    assert parametrization_of(linears["3.down_proj"], Scaled) is not None
    take_off(linears["3.down_proj"], Scaled, leave)
    assert is_split(home)
    join(model)
    expected = by_hand() if leave else ARCHITECTURES["mixtral"].build()
    assert type(home) is type(expected.get_submodule(PATH))
    assert home.gate_up_proj is parameters["parametrizations.gate_up_proj.original"]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in expected.named_modules()]
    for (name, value), (other, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(value, wanted)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, expected(**BATCH).logits)


def test_a_copy_is_a_model_of_its_own():
    model, linears = made()
    twin = copy.deepcopy(model)
    take_off(linears["1.up_proj"], Scaled, True)
    take_off(linears["3.down_proj"], Scaled, True)
    assert len([s for s in twin.modules() if isinstance(s, ExpertSlices)]) == 2
    with torch.no_grad():
        assert torch.equal(twin(**BATCH).logits, by_hand()(**BATCH).logits)
    unparametrize(twin.get_submodule(PATH))
    assert list(fused_experts(twin)) == list(fused_experts(ARCHITECTURES["mixtral"].build()))
