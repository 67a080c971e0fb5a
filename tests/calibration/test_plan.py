"""The order of the walk: where segments begin, and where a run with stubs is not like the dense one."""

import logging

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.plan import make_plan
from lightning_compress.calibration.probe import run_probe
from tests.support.calibration_models import (
    Biased,
    C,
    Dense,
    Layered,
    LockstepWatcher,
    Mixer,
    Watcher,
    inputs_of,
    make_batches,
    plain,
    seeded,
    started,
)


def test_a_batch_that_goes_another_way_splits_the_segment(caplog):
    class Odd(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x + 0 if len(x) == 3 else x, mask=torch.ones_like(x))
            return self.head(x)

    batches = [*make_batches(2, 2, 5, C), *make_batches(1, 3, 5, C)]
    model, watcher = seeded(Odd), LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(watcher, model=model), batches)
    assert "run one by one: batch 2" in caplog.text
    wanted = inputs_of(model.eval(), list(watcher.inputs), plain(None, batches))
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(watcher.inputs[n], wanted[n], strict=True))


def test_slower_ways_are_told(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(Watcher(), model=seeded(Biased)), make_batches(2, 2, 5, C))
    assert "arguments of 'blocks.1' are computed from outputs of blocks" in caplog.text
    assert "running the model from its start" in caplog.text


def test_shared_blocks_make_it_a_whole_walk():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Mixer(), Mixer()])

        def forward(self, x):
            for layer in [*self.layers, *self.layers]:
                x = layer(x, torch.ones_like(x))
            return x

    watcher = Watcher()
    with pytest.warns(UserWarning, match=r"'layers.0' runs 2 times per forward pass"):
        calibrate(*started(watcher, model=seeded(Recurrent)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.1.q"]) == 4
    impossible = pytest.raises(ValueError, match=r"walk='one_pass' is not possible: 'layers.0.q' runs 2 times")
    with pytest.warns(UserWarning, match="runs 2 times"), impossible:
        calibrate(
            *started(LockstepWatcher(), model=seeded(Recurrent)),
            make_batches(2, 2, 5, C),
            options=CalibrationOptions(walk="one_pass"),
        )


def planned(model, x, names=("head",)):
    blocks = find_blocks(model)
    targets = {model.get_submodule(name): name for name in names}
    with torch.no_grad():
        probe = run_probe(model, lambda: model(x), blocks, targets, None)
        return make_plan(model, lambda: model(x), blocks, probe, targets)


def names_of(plan):
    return [[block.name for block in segment] for segment in plan.segments]


def test_linked_blocks_are_one_segment_with_the_modules_around_it():
    plan = planned(seeded(Layered).eval(), make_batches(1, 2, 5, C)[0])
    assert names_of(plan) == [["layers.0", "layers.1", "layers.2"]]
    assert [list(modules) for modules in plan.outside] == [["embed"], ["norm", "head"]]
    assert plan.stub_last


def test_a_head_that_reads_all_blocks_cannot_be_reached_by_stubs():
    assert not planned(seeded(Dense).eval(), make_batches(1, 2, 5, C)[0]).stub_last


def test_arguments_from_outputs_of_blocks_make_each_block_a_segment():
    plan = planned(seeded(Biased).eval(), make_batches(1, 2, 5, C)[0], ("blocks.0.lin",))
    assert names_of(plan) == [["blocks.0"], ["blocks.1"], ["blocks.2"]]


def test_splitting_a_segment_keeps_the_modules_after_it():
    plan = planned(seeded(Layered).eval(), make_batches(1, 2, 5, C)[0])
    plan.split(0)
    assert names_of(plan) == [["layers.0"], ["layers.1"], ["layers.2"]]
    assert [list(modules) for modules in plan.outside] == [[], [], [], ["norm", "head"]]
    assert not plan.stub_last
