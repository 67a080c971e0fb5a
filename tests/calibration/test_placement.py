"""Blocks on another device: ``cpu:0`` counts as another one than ``cpu``, and moves are noted."""

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from tests.support.calibration_models import (
    C,
    EncoderDecoder,
    Layered,
    LockstepWatcher,
    Mixer,
    Watcher,
    make_batches,
    seeded,
    started,
)


@pytest.fixture
def away(monkeypatch):
    """Names of the blocks that are on the device, kept up to date; and all sets of them that were seen."""
    there, seen = set(), []

    def to(self, device, **kwargs):
        (there.add if device == torch.device("cpu:0") else there.discard)(self)
        seen.append(len(there))
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return there, seen


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
@pytest.mark.parametrize(("model_class", "forward"), [(Layered, None), (EncoderDecoder, lambda m, x: m(x, x[:, :2]))])
def test_one_block_at_a_time_is_on_the_device(away, walk, model_class, forward):
    there, seen = away
    model, plain, batches = seeded(model_class), LockstepWatcher(), make_batches(2, 2, 5, C)
    calibrate(
        *started(plain, model=seeded(model_class)), batches, forward=forward, options=CalibrationOptions(walk=walk)
    )
    assert seen == []

    class There(LockstepWatcher):
        def see(self, module, args):
            name = self._names[module].rpartition(".")[0]
            assert not name or self.home.get_submodule(name) in there  # a block's target is looked at on the device
            super().see(module, args)

        @property
        def home(self):
            return model

    watcher = There()
    calibrate(
        *started(watcher, model=model),
        batches,
        forward=forward,
        options=CalibrationOptions(walk=walk, device="cpu:0", offload_device="cpu"),
    )
    assert there == set()
    assert max(seen) == 1
    assert watcher.inputs.keys() == plain.inputs.keys()
    assert all(torch.equal(a, b) for n in plain.inputs for a, b in zip(watcher.inputs[n], plain.inputs[n], strict=True))


def test_a_model_without_blocks_goes_as_a_whole(away):
    there, seen = away
    model = Mixer()

    class There(Watcher):
        def see(self, module, args):
            assert model in there

    calibrate(
        *started(There(), model=model),
        make_batches(2, 2, 5, C),
        CalibrationOptions(walk="whole", device="cpu:0"),
        forward=lambda m, x: m(x, torch.ones_like(x)),
    )
    assert there == set()
    assert max(seen) == 1


def test_blocks_come_home_after_an_error(away):
    there, _ = away
    model = seeded(Layered)
    model.layers[1].v.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        calibrate(
            *started(Watcher(), model=model), make_batches(2, 2, 5, C), options=CalibrationOptions(device="cpu:0")
        )
    assert there == set()
