"""Blocks on another device (``cpu:0`` counts as another one than ``cpu``, and moves are noted), and blocks on disk."""

from collections import Counter

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.residence import OnDisk, fill
from tests.support.calibration_models import (
    C,
    Dense,
    EncoderDecoder,
    Layered,
    LockstepWatcher,
    Mixer,
    OwnPassWatcher,
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


# -- on disk ----------------------------------------------------------------------------------------------------------


class Folder:
    """The tensors of a model, in place of files; what is read and written is noted."""

    def __init__(self, model):
        self.model, self.tensors = model, {n: t.clone() for n, t in model.state_dict().items()}
        self.reads, self.stored, self.most = Counter(), {}, 0
        for container in [m for m in model.children() if isinstance(m, nn.ModuleList)]:
            container.to("meta")

    def read(self, name):
        self.reads[name] += 1
        in_memory = {
            n.split(".")[1] for n, p in self.model.named_parameters() if n.startswith("layers.") and not p.is_meta
        }
        self.most = max(self.most, len(in_memory | {name.split(".")[1]}))
        return self.tensors[name].clone()

    def store(self, name, modules):
        if name.startswith("layers"):
            self.stored[name] = {n: t.clone() for n, t in modules[name].state_dict().items()}

    @property
    def residence(self):
        return OnDisk(self.read)

    @property
    def log(self):
        log = NoLog()
        vars(log)["store"] = self.store
        return log


@pytest.mark.parametrize(
    "recipe", [[LockstepWatcher], [Watcher], [OwnPassWatcher, LockstepWatcher]], ids=["one pass", "two", "stages"]
)
def test_blocks_on_disk_end_as_in_memory_and_are_read_twice(recipe):
    batches, model = make_batches(3, 2, 5, C), seeded(Layered)
    calibrate(*started(*[kind() for kind in recipe], model=model), batches)
    expected = model.state_dict()
    folder = Folder(seeded(Layered))
    calibrate(
        *started(*[kind() for kind in recipe], model=folder.model), batches, residence=folder.residence, log=folder.log
    )
    results = folder.model.state_dict() | {
        f"{name}.{local}": tensor for name, tensors in folder.stored.items() for local, tensor in tensors.items()
    }
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert set(folder.reads.values()) == {2}
    assert folder.most == 1
    assert all(p.is_meta for p in folder.model.layers.parameters())
    assert list(folder.stored) == ["layers.0", "layers.1", "layers.2"]


class Rounder(Watcher):
    """Without data."""

    needs = Watcher.needs.__class__(calibration=True)

    def on_calibration_start(self, state, event, **kwargs):
        self._names.update({m: n for n, m in state.model.named_modules() if isinstance(m, nn.Linear)})


def test_without_data_each_block_is_read_once():
    model, folder = seeded(Layered), Folder(seeded(Layered))
    calibrate(*started(Rounder(), model=model), None)
    calibrate(*started(Rounder(), model=folder.model), None, residence=folder.residence, log=folder.log)
    assert set(folder.reads.values()) == {1}
    for name, tensors in folder.stored.items():
        assert all(torch.equal(tensors[n], t) for n, t in model.get_submodule(name).state_dict().items())


def test_an_error_leaves_no_block_in_memory_and_stores_nothing():
    folder = Folder(seeded(Layered))
    folder.model.layers[1].v.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        calibrate(
            *started(Watcher(), model=folder.model),
            make_batches(2, 2, 5, C),
            residence=folder.residence,
            log=folder.log,
        )
    assert all(p.is_meta for p in folder.model.layers.parameters())
    assert folder.stored == {}


def test_nan_on_the_disk_is_named():
    folder = Folder(seeded(Layered))
    folder.tensors["layers.1.k.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or Inf in the weights \['layers.1.k.weight'\]"):
        calibrate(*started(Rounder(), model=folder.model), None, residence=folder.residence, log=folder.log)


class Unchained(nn.Module):
    """The second block does not get what the first one returns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(2))

    def forward(self, x):
        mask = torch.ones_like(x)
        return self.layers[1](torch.tanh(self.layers[0](x, mask)), mask)


@pytest.mark.parametrize("model_class", [Unchained, Dense])
def test_blocks_that_are_needed_after_their_turn_are_refused(model_class):
    model = seeded(model_class)
    if model_class is Dense:
        model.layers = model.blocks
    folder = Folder(model)
    with pytest.raises(ValueError, match="needed again after its turn; compress this model in memory"):
        calibrate(
            *started(Watcher(), model=model), make_batches(2, 2, 5, C), residence=folder.residence, log=folder.log
        )
    assert folder.stored == {}


def test_targets_that_the_first_batch_does_not_reach_are_refused():
    model = seeded(Layered)
    model.layers[1].spare = nn.Linear(C, C)
    folder = Folder(model)
    with (
        pytest.warns(UserWarning, match="does not reach"),
        pytest.raises(ValueError, match=r"does not reach layers\.1\.spare"),
    ):
        calibrate(
            *started(Watcher(), model=model), make_batches(2, 2, 5, C), residence=folder.residence, log=folder.log
        )


def test_a_model_without_blocks_is_refused():
    folder = Folder(seeded(Layered))
    with pytest.raises(ValueError, match="the model is walked as a whole, and it is larger than memory"):
        calibrate(
            *started(Watcher(), model=folder.model),
            make_batches(2, 2, 5, C),
            CalibrationOptions(walk="whole"),
            residence=folder.residence,
            log=folder.log,
        )


def test_filling_keeps_shared_parameters_and_the_dtype_of_the_model():
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    module.to(torch.bfloat16).to("meta")
    module["b"].weight = module["a"].weight
    names = []
    fill(module, "x.", lambda name: names.append(name) or torch.ones(2, 2))
    assert module["a"].weight is module["b"].weight
    assert module["a"].weight.dtype == torch.bfloat16
    assert names == ["x.a.weight"]


def test_another_shape_in_the_files_is_named():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'x.weight' has shape \[4\] in the files, and \[3, 2\] by config.json"):
        fill(module, "x.", lambda _name: torch.ones(4))
