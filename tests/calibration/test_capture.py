"""Inputs of blocks from runs in which the blocks are stubs."""

import pytest
import torch
from torch import nn

from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.capture import BrokenLinkError, capture, run_to_stop, stop, stopped_before, stubbed
from lightning_compress.calibration.probe import run_probe
from tests.support.calibration_models import C, Layered, make_batches, seeded


@pytest.fixture
def model():
    return seeded(Layered).eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def segment_of(model, x):
    blocks = find_blocks(model)
    return run_probe(model, lambda: model(x), blocks, {}, None).blocks, blocks


def test_arguments_of_all_blocks_come_from_one_run_without_their_work(model):
    one, other = make_batches(2, 2, 5, C)
    segment, blocks = segment_of(model, one)
    ran = []
    for name, block in blocks.items():
        block.q.register_forward_hook(lambda _m, _a, _o, n=name: ran.append(n))
    hidden, calls = capture(lambda: model(other), segment, blocks)
    assert ran == []
    assert torch.equal(hidden, model.embed(other))
    local = (model.embed(other).sum(-1, keepdim=True) > 0).float()
    assert torch.equal(calls["layers.1"].kwargs["mask"], local)
    assert torch.equal(calls["layers.2"].kwargs["mask"], 1 - local)
    assert [calls[name].kwargs["scale"] for name in blocks] == [0.5, 1.5, 2.5]
    assert "forward" not in vars(model.layers[0])


def test_a_block_that_is_not_called_breaks_the_chain(model):
    x = make_batches(1, 2, 5, C)[0]
    segment, blocks = segment_of(model, x)
    with pytest.raises(BrokenLinkError, match=r"block 'layers.0' was not called"):
        capture(lambda: None, segment, blocks)
    twice = nn.Sequential(model, model)
    model.head = nn.Linear(4, C)
    model.norm = nn.Linear(C, 4)
    with pytest.raises(BrokenLinkError, match=r"block 'layers.0' .*twice|does not take"):
        capture(lambda: (model.layers[0](x, x), twice(x)), segment, blocks)


def test_a_forward_on_the_instance_is_put_back(model):
    x = make_batches(1, 2, 5, C)[0]
    segment, blocks = segment_of(model, x)
    forward = model.layers[0].forward
    vars(model.layers[0])["forward"] = forward  # as accelerate does
    with stubbed(segment, blocks, last=stop):
        assert vars(model.layers[0])["forward"] is not forward
    assert vars(model.layers[0])["forward"] is forward
    assert all("forward" not in vars(layer) for layer in model.layers[1:])


def test_a_run_is_stopped_where_a_block_is_called(model):
    ran = []
    for name, layer in model.layers.named_children():
        layer.out.register_forward_hook(lambda _m, _a, _o, n=name: ran.append(n))
    with stopped_before(model.layers[1]):
        run_to_stop(lambda: model(make_batches(1, 2, 5, C)[0]))
    assert ran == ["0"]
    run_to_stop(lambda: model(make_batches(1, 2, 5, C)[0]))
    assert ran == ["0", "0", "1", "2"]
