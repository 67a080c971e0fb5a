"""State.replay: a modifier that finishes whole blocks may put each batch through the block again."""

from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Event, Needs, State
from tests.support.calibration_models import LockstepWatcher, Watcher, started


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.blocks(x))


class Replayer(Watcher):
    """At BLOCK_END the block's outputs, and what they are once its weight is halved."""

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True)
    outputs: dict[str, list[Any]] = Field(default_factory=dict)
    halved: dict[str, list[Any]] = Field(default_factory=dict)
    asked: list[Any] = Field(default_factory=list)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if state.replay is None:
            self.asked.append(state.block_name)
            return
        seen = {name: len(inputs) for name, inputs in self.inputs.items()}
        self.outputs[state.block_name] = []
        for i in range(state.batches):
            self.outputs[state.block_name].append(state.replay(i))
            self.masks.append(self.token_mask)
        assert {name: len(inputs) for name, inputs in self.inputs.items()} == seen  # hooks are paused
        for module in state.modules.values():
            if isinstance(module, nn.Linear):
                module.weight.data *= 0.5
        self.halved[state.block_name] = [state.replay(i) for i in range(state.batches)]


BATCHES = [{"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i))} for i in range(2)]


@pytest.mark.parametrize("walk", ["auto", "two_pass", "whole"])
def test_each_batch_goes_through_the_block_as_it_is_now(walk):
    model, replayer = Model(), Replayer(targets=["Linear"])
    dense = Model()
    calibrate(*started(replayer, model=model), BATCHES, options=CalibrationOptions(walk=walk))
    x = BATCHES[1]["x"]
    if walk == "whole":
        assert torch.equal(replayer.outputs[""][1], dense(x))
        assert torch.equal(replayer.halved[""][1], model(x))
        return
    for name, before, after in zip(replayer.outputs, [*dense.blocks, None], [*model.blocks, None], strict=True):
        if before is None:
            assert name == ""
            assert torch.equal(replayer.outputs[name][1], dense.head(x))
        else:
            assert torch.equal(replayer.outputs[name][1], before(x))
            x = after(x)  # the walk goes on with this
            assert torch.equal(replayer.halved[name][1], x)


def test_masks_are_those_of_the_batch_that_runs():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    replayer = Replayer(targets=["Linear"], change=False)
    calibrate(*started(replayer, model=Model()), [BATCHES[0], {**BATCHES[1], "attention_mask": mask}])
    kept = [m for m in replayer.masks if m is not None]
    assert kept
    assert all(torch.equal(m, mask.bool()) for m in kept)


def test_a_later_lockstep_modifier_sees_what_the_replays_left():
    model, replayer, lockstep = Model(), Replayer(targets=["Linear"]), LockstepWatcher(targets=["Linear"])
    calibrate(*started(replayer, lockstep, model=model), BATCHES)
    assert [name for event, name in lockstep.events if event == "MODULE_READY"]
    assert len(lockstep.inputs["blocks.0.fc"]) == len(BATCHES)


def test_in_lockstep_the_inputs_are_gone():
    class Asking(LockstepWatcher):
        asked: list[Any] = Field(default_factory=list)

        def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
            self.asked.append((state.replay, state.batches))

    asking = Asking(targets=["Linear"])
    calibrate(*started(asking, model=Model()), BATCHES)
    assert asking.asked[:3] == [(None, 0)] * 3
