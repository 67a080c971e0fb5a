"""DTensors of a group of one process: values, hooks, classes. Two ranks are in tests/training/test_sharding_fsdp.py."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_compress.layers.sharded import (
    full,
    gathered,
    is_dtensor,
    is_sharded,
    local,
    plain_modules,
    reshard,
    shard_alike,
    sharded_like,
)
from tests.support.sharded_runs import group_of_one


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 6))
    model[3].weight = model[0].weight
    with group_of_one():
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        parallelize_module(model, mesh["tensor_parallel"], {"2": ColwiseParallel()})
        fully_shard(model, mesh=mesh["data_parallel"])
        yield model


def test_values_come_and_go(model):
    before = full(model[0].weight).clone()
    assert is_sharded(model)
    assert not is_sharded(nn.Linear(2, 2))
    with torch.no_grad(), gathered(model):
        assert not is_sharded(model)
        assert model[3].weight is model[0].weight
        assert torch.equal(model[0].weight, before)
        model[0].weight.data = before + 1
        model[2].bias.zero_()
    assert isinstance(model[0].weight, DTensor)
    assert model[3].weight is model[0].weight
    assert torch.equal(full(model[0].weight), before + 1)
    assert not full(model[2].bias).any()


def test_nothing_is_written_that_was_only_read_or_failed(model):
    before = full(model[0].bias).clone()
    with gathered(model, write=False):
        model[0].bias.data = before + 1
    with suppress(KeyError), gathered(model):
        model[0].bias.data = before + 1
        raise KeyError
    assert torch.equal(full(model[0].bias), before)


def test_another_shape_is_refused(model):
    with (
        pytest.raises(ValueError, match="'weight' of a Linear is sharded with shape .6, 4. and is of shape .5, 4. now"),
        gathered(model[0]),
    ):
        model[0].weight = nn.Parameter(model[0].weight[:5])
    assert model[0].weight.shape == (6, 4)


def test_full_values_take_the_placement_of_a_weight(model):
    weight = model[2].weight
    mask = sharded_like(full(weight) > 0, weight)
    assert mask.placements == weight.placements
    assert torch.equal(local(weight) > 0, local(mask))
    assert torch.equal(full(mask), full(weight) > 0)
    plain = torch.ones(2)
    assert sharded_like(plain, plain) is plain
    assert torch.equal(full(plain), local(plain))


def test_a_copy_is_sharded_alike():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 4)), torch.randn(3, 4)
    copies, expected = [copy.deepcopy(model) for _ in range(2)], model(x)
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        other = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        for module in (copies[0], other):
            shard_alike(module, model)
        shard_alike(copies[1], copy.deepcopy(copies[1]))  # which is not sharded
        assert all(map(is_dtensor, copies[0].parameters()))
        with torch.no_grad():
            assert torch.equal(copies[0](x), expected)
        assert all(map(is_dtensor, copies[0].parameters()))  # the outermost is not kept whole
        assert not is_sharded(other)
        assert not is_sharded(copies[1])


def test_modules_are_plain_inside_and_parallel_afterwards(model):
    x, calls = torch.randn(3, 4), []
    expected = model(x)
    reshard(model)
    hook = model[0].register_forward_hook(lambda *args: calls.append(args))
    hooks = {m: (list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()}
    with plain_modules(model), gathered(model, write=False):
        assert type(model) is nn.Sequential
        later = model[2].register_forward_hook(lambda *args: calls.append(args))
        assert torch.equal(model(x), expected)  # with hooks of parallelize_module it would be a DTensor
        assert len(calls) == 2
        hook.remove()
    assert isinstance(model, FSDPModule)
    later.remove()
    hooks[model[0]] = (hooks[model[0]][0], [])
    assert hooks == {m: (list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()}
    assert torch.equal(model(x), expected)
    assert len(calls) == 2
