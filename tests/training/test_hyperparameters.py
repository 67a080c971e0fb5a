"""Modules among hyperparameters: the copy that a checkpoint gets."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress import LearnedMaskModifier, QATModifier, QuantizationModifier, compress
from lightning_compress.core import State
from lightning_compress.layers.split_experts import split
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.training.hyperparameters import plain_copy, write_plain_modules
from tests.support.training_runs import RoundingModifier


class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.layers = [net[0]]  # a reference that torch does not know of


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 8, 4)), nn.Parameter(torch.randn(2, 4, 4))

    def _apply_gate(self, x):
        return x[..., :4] * x[..., 4:]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.Sequential(Experts(), nn.GRU(4, 4)))


def train_quantized(net):
    QATModifier(scheme="W8A8", targets=["Linear"]).initialize(State(model=net))


def train_recurrent(net):
    QATModifier(scheme="W8A16", group_size=-1, targets=["GRU"]).initialize(State(model=net))


def round_recurrent(net):
    compress(net, QuantizationModifier(scheme="W8A16", group_size=-1, targets=["GRU"]))


def learn_masks(net):
    LearnedMaskModifier(start=0, end=4).initialize(State(model=net))


def hook(net):
    RoundingModifier().hook(net[0], lambda module, args: None)


def round_weights(net):
    compress(net[:3], QuantizationModifier(scheme="W8A8", targets=["Linear"]))


def rotate(net):
    OnlineRotations((OnlineRotation("input", (1,) * 8),)).attach(net[0])


MARKS = [train_quantized, train_recurrent, learn_masks, hook, round_weights, round_recurrent, rotate, split]


@pytest.mark.parametrize("mark", MARKS)
def test_the_copy_is_what_the_network_was(mark):
    net = network()
    dense = net.state_dict()
    tables = {name: copy.copy(vars(module)) for name, module in net.named_modules()}
    mark(net)
    foreign = net[1].register_forward_hook(print)
    weights = net.state_dict()
    hparams = {"net": net, "lr": 0.1, "deep": {"list": [Wrapper(net), 3]}, "other": nn.Linear(2, 2)}
    checkpoint = {"hyper_parameters": dict(hparams)}
    write_plain_modules(checkpoint)
    foreign.remove()

    stored = checkpoint["hyper_parameters"]
    assert b"lightning_compress" not in pickle.dumps({**stored, "deep": None})
    assert stored["other"] is hparams["other"]
    wrapper = stored["deep"]["list"][0]
    assert (wrapper.net, wrapper.layers[0]) == (stored["net"], stored["net"][0])
    plain = stored["net"]
    assert plain is not net
    assert print in plain[1]._forward_hooks.values()  # what others have put there stays
    assert list(plain.state_dict()) == list(dense)
    assert all(plain.state_dict()[key].data_ptr() == weights[key].data_ptr() for key in weights)
    for name, module in plain.named_modules():
        assert vars(module).keys() == tables[name].keys(), name
        assert type(module) is type(network().get_submodule(name))


def test_a_network_that_carries_nothing_is_stored_itself():
    net = network()
    checkpoint = {"hyper_parameters": {"net": net}}
    write_plain_modules(checkpoint)
    assert checkpoint["hyper_parameters"]["net"] is net


def test_hooks_do_not_drag_their_modifier_into_the_copy():
    class Uncopied(RoundingModifier):
        def __deepcopy__(self, memo=None):
            raise AssertionError("copied")

    net, modifier = network(), Uncopied()
    modifier.hook(net[0], modifier.on_finalize)
    assert not plain_copy(net)[0]._forward_pre_hooks
