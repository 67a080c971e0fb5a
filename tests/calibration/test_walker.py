"""A walk over models that are out of the ordinary, and what it reports."""

import logging
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.options import CalibrationOptions
from tests.support.calibration_models import (
    C,
    Layered,
    LockstepWatcher,
    Watcher,
    inputs_of,
    make_batches,
    plain,
    seeded,
    started,
)


@pytest.mark.parametrize("walk", ["auto", "two_pass"])
def test_a_model_without_blocks_is_walked_as_a_whole(walk, caplog):
    model, watcher = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3)), LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(
            *started(watcher, model=model), (batches := make_batches(2, 4, C)), options=CalibrationOptions(walk=walk)
        )
    assert "no repeated blocks in Sequential: it is walked as a whole" in caplog.text
    assert watcher.events[-2] == ("BLOCK_END", "")
    assert watcher.finished == ["0", "2"]
    if walk == "auto":  # in lockstep: the second one sees the first one rounded
        wanted = inputs_of(model, ["2"], plain(None, batches))["2"]
        assert all(torch.equal(a, b) for a, b in zip(watcher.inputs["2"], wanted, strict=True))


def test_blocks_that_are_not_called_are_named_and_told_their_end():
    class Skipping(Layered):
        def forward(self, x):
            return self.head(self.layers[2](self.layers[0](self.embed(x), torch.ones_like(x)), torch.ones_like(x)))

    watcher = Watcher()
    blocks = pytest.warns(UserWarning, match=r"does not reach the blocks \['layers.1'\]")
    targets = pytest.warns(UserWarning, match=r"does not reach the targets \['layers.1.q', .*'layers.1.out'\]")
    with blocks, targets:
        calibrate(*started(watcher, model=seeded(Skipping)), make_batches(2, 2, 5, C))
    assert ("BLOCK_END", "layers.1") in watcher.events


def test_multihead_attention_is_named():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    watcher = LockstepWatcher()
    with pytest.warns(UserWarning, match=r"\['layers.0.self_attn.out_proj', .*'\]: nn.MultiheadAttention uses"):
        calibrate(*started(watcher, model=model), make_batches(2, 2, 5, C))
    assert sorted(watcher.inputs) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]  # not fused


def test_progress_goes_up_to_its_total():
    told = []
    batches = make_batches(2, 2, 5, C)
    calibrate(*started(LockstepWatcher(), model=seeded(Layered)), batches, progress=lambda *a: told.append(a))
    assert told[0][0].startswith("probe")
    assert told[-1] == ("done", 4, 4)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert ("layers.1: layers.1.k, batch 2/2", 1, 4) in told


@pytest.mark.parametrize(("walk", "count"), [("one_pass", 4 * 3 + 3 + 2), ("two_pass", 3)])
def test_it_may_be_interrupted_after_each_module_and_each_block(walk, count):
    calls, watcher = [], LockstepWatcher()

    def interrupt():
        calls.append(list(watcher.finished))
        if len(calls) == stop:
            raise KeyboardInterrupt

    for stop in (count + 1, count - 1):
        calls.clear()
        watcher, model = LockstepWatcher(), seeded(Layered)
        with pytest.raises(KeyboardInterrupt) if stop < count else nullcontext():
            calibrate(
                *started(watcher, model=model),
                make_batches(2, 2, 5, C),
                options=CalibrationOptions(walk=walk),
                log=NoLog(interrupt),
            )
        assert len(calls) == min(stop, count)
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert calls[-1] == watcher.finished  # nothing was finished after it


def test_what_a_small_sample_does_not_reach_is_looked_for_in_the_whole_batch():
    class Routed(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers[: 1 + len(x)]:  # the third one runs for two rows only
                x = layer(x, torch.ones_like(x))
            return self.head(x)

    watcher = LockstepWatcher()
    calibrate(*started(watcher, model=seeded(Routed)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.2.q"]) == 2


def test_a_model_that_wants_whole_batches_gets_them():
    class Pairs(Layered):
        def forward(self, x):
            left, right = x.chunk(2)
            return super().forward(left) * super().forward(right)

    watcher = Watcher()
    with pytest.warns(UserWarning, match=r"'layers.0' runs 2 times"):
        calibrate(*started(watcher, model=seeded(Pairs)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.2.q"]) == 4


def test_batches_that_call_blocks_differently_are_told():
    class Shallow(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers[: 4 - len(x)]:  # the last one does not run for two rows
                x = layer(x, torch.ones_like(x))
            return self.head(x)

    batches = [*make_batches(1, 1, 5, C), *make_batches(1, 2, 5, C)]
    message = r"batch 1 does not run .* as the first one did: block 'layers.2' was not called; use walk='whole'"
    with pytest.raises(ValueError, match=message):
        calibrate(*started(Watcher(), model=seeded(Shallow)), batches)
    watcher = Watcher()
    calibrate(*started(watcher, model=seeded(Shallow)), batches, options=CalibrationOptions(walk="whole"))
    assert len(watcher.inputs["layers.2.q"]) == 1


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_inputs_of_one_block_are_alive_not_of_all(walk):
    alive, most = weakref.WeakSet(), []

    class Counting(nn.Module):
        """A block whose outputs are watched."""

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(C, C)

        def forward(self, x):
            y = torch.tanh(self.lin(x))
            alive.add(y)
            most.append(len(alive))
            return y

    class Blind(LockstepWatcher):
        def see(self, module, args):
            """Keep nothing."""

    model = nn.Sequential(*[Counting() for _ in range(6)])
    watcher = Blind(change=False)
    calibrate(*started(watcher, model=model), make_batches(4, 2, 5, C), options=CalibrationOptions(walk=walk))
    assert max(most) <= 4 + 2  # one per batch, and those on their way


def test_peculiar_batches_reach_the_walk_of_their_own_arguments():
    """Batches of different shapes, of which only some have a mask to share."""
    batches = [*make_batches(1, 2, 5, C), *make_batches(1, 1, 7, C), *make_batches(2, 3, 4, C)]
    model, watcher = seeded(Layered), LockstepWatcher()
    calibrate(*started(watcher, model=model), batches)
    wanted = inputs_of(model.eval(), list(watcher.inputs), plain(None, batches))
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(watcher.inputs[n], wanted[n], strict=True))
