import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_compress.calibration.modes import calibration_mode


def test_the_model_is_as_calibration_needs_it():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    with torch.inference_mode(), calibration_mode(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.ones(1).is_inference()  # weights written now can be trained later
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back_module_by_module(fails):
    class Config:
        use_cache = True

    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout()).train()
    model[2].eval()
    model.config = model[1].config = Config()
    before = torch.get_rng_state()
    try:
        with calibration_mode(model):
            assert model.config.use_cache is False
            torch.rand(3)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [m.training for m in model] == [True, True, False]
    assert model.config.use_cache is True
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_go_on_with_the_old_weights():
    linear = nn.Linear(4, 4, bias=False)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x)
        with calibration_mode(linear):
            linear(x)
            linear.weight.data = torch.zeros(4, 4)
            assert linear(x).abs().sum() == 0
        assert torch.is_autocast_cache_enabled()
        assert linear(x).abs().sum() == 0


def test_a_compiled_model_runs_its_hooks():
    """In a process of its own: importing dynamo is slow, and changes what other tests see."""
    code = """
import torch
from torch import nn
from lightning_compress.oneshot import compress
from tests.support.calibration_models import Layered, LockstepWatcher, make_batches, seeded

batches = make_batches(2, 2, 5, 8)
plain = LockstepWatcher(); compress(seeded(Layered), plain, batches)
model = seeded(Layered)
model.layers[1] = torch.compile(model.layers[1], backend="eager")
whole = LockstepWatcher(); compress(model, whole, batches)
model = torch.compile(seeded(Layered), backend="eager")
model(batches[0])
around = LockstepWatcher(); compress(model, around, batches)
for seen in (whole, around):
    names = {n.replace("_orig_mod.", ""): x for n, x in seen.inputs.items()}
    assert sorted(names) == sorted(plain.inputs)
    assert all(torch.equal(a, b) for n in names for a, b in zip(names[n], plain.inputs[n], strict=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
