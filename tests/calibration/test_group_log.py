"""What the walk tells a log, and that a group which the log holds is not calibrated again."""

import pytest
import torch

from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.sequential import calibrate
from tests.support.calibration_models import C, Layered, LockstepWatcher, Watcher, make_batches, seeded, started

OUTSIDE = "modules outside of blocks"
BLOCKS = ["layers.0", "layers.1", "layers.2"]


class Memory:
    """Keeps the weights of every group; ``known`` are those of an earlier run."""

    interrupt = staticmethod(NoLog().interrupt)

    def __init__(self, known=()):
        self.known, self.calls, self.groups = dict(known), [], {}

    def begin(self, lifecycle, state, batches, blocks, options):
        self.calls.append(f"begin with {len(batches)} batches, {', '.join(blocks)}")

    def restore(self, title, modules):
        for name, weight in self.known.get(title, {}).items():
            modules[name].weight.data.copy_(weight)
        self.calls.append(f"{'take' if title in self.known else 'ask for'} {title}")
        return title in self.known

    def store(self, title, modules):
        self.groups[title] = {n: m.weight.detach().clone() for n, m in modules.items() if hasattr(m, "weight")}
        self.calls.append(f"store {title}")


def walked(log, watcher=Watcher, batches=3, **options):
    """(model, modifier) after a calibration."""
    model, modifier = seeded(Layered), watcher()
    lifecycle, state = started(modifier, model=model)
    data = make_batches(batches, 2, 5, C) if batches else None
    calibrate(lifecycle, state, data, CalibrationOptions(**options), log=log)
    return model, modifier


@pytest.mark.parametrize("walk", ["two_pass", "one_pass"])
def test_groups_are_asked_for_and_stored_in_the_order_of_the_walk(walk):
    log = Memory()
    walked(log, LockstepWatcher, walk=walk)
    begin, *calls = log.calls
    assert begin == f"begin with 3 batches, {', '.join(BLOCKS)}"
    assert calls == [f"{verb} {name}" for name in (OUTSIDE, *BLOCKS, OUTSIDE) for verb in ("ask for", "store")]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("walk", ["two_pass", "one_pass"])
def test_a_group_that_is_taken_is_not_seen_and_the_rest_sees_its_outputs(walk, count):
    log = Memory()
    model, watcher = walked(log, LockstepWatcher, walk=walk)
    again = Memory(dict(zip(BLOCKS, (log.groups[name] for name in BLOCKS[:count]), strict=False)))
    resumed, second = walked(again, LockstepWatcher, walk=walk)
    assert [call for call in again.calls if call.startswith("take")] == [f"take {name}" for name in BLOCKS[:count]]
    assert {n for n in second.inputs if n.startswith("layers")} == {
        n for n in watcher.inputs if n.startswith(tuple(BLOCKS[count:]))
    }
    for name, seen in second.inputs.items():
        assert torch.equal(torch.stack(seen), torch.stack(watcher.inputs[name])), name
    assert not second.hooked
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_without_data_groups_are_taken_too():
    class NeedsNone(Watcher):
        needs = Watcher.needs.__class__(calibration=True)

    log = Memory()
    model, _ = walked(log, NeedsNone, batches=0)
    again = Memory(log.groups)
    resumed, second = walked(again, NeedsNone, batches=0)
    assert [name for event, name in second.events if event == "BLOCK_END"] == []
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in model.state_dict().items())
