"""The dense run of the first batch: calls, links, and numbers that are not finite."""

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.activations import HIDDEN
from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.probe import run_probe
from tests.support.calibration_models import Biased, C, Layered, LockstepWatcher, Stages, make_batches, seeded, started


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_that_is_not_finite_is_named(walk, at):
    batches = make_batches(3, 2, 5, C)
    batches[at][1, 2, 3] = float("nan")
    watcher = LockstepWatcher()
    lifecycle, state = started(watcher, model=seeded(Layered))
    with pytest.raises(ValueError, match=rf"NaN in .*'.*' for calibration batch {at}, expected finite numbers"):
        calibrate(lifecycle, state, batches, options=CalibrationOptions(walk=walk))
    assert watcher.hooked == []


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_the_module_that_makes_it_is_named(walk):
    """Every batch but the last is fine, and the last one overflows inside a block, behind its last target."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.pow = nn.Linear(C, C), Power()

        def forward(self, x):
            return self.pow(self.lin(x))

    class Power(nn.Module):
        def forward(self, x):
            return torch.exp(x)

    model = nn.Sequential(*[Overflowing() for _ in range(2)])
    batches = make_batches(2, 2, C)
    batches[1] *= 1e4
    with pytest.raises(ValueError, match=r"Inf in the output of block '0' \(first out of module '0.pow'\) .* batch 1"):
        calibrate(*started(LockstepWatcher(), model=model), batches, options=CalibrationOptions(walk=walk))


def test_padding_may_be_anything():
    batches = make_batches(2, 2, 5, C)
    batches[1][0, 4] = float("nan")
    mask = torch.ones(2, 5)
    mask[0, 4] = 0
    calibrate(*started(LockstepWatcher(), model=seeded(Layered)), [{"x": x, "attention_mask": mask} for x in batches])


def probed(model, x, names=("layers.0.q", "head")):
    blocks = find_blocks(model)
    targets = {model.get_submodule(name): name for name in names}
    with torch.no_grad():
        return run_probe(model, lambda: model(x), blocks, targets, None)


def test_blocks_are_recorded_in_the_order_of_their_calls_with_their_links():
    model = seeded(Layered).eval()
    probe = probed(model, make_batches(1, 2, 5, C)[0])
    assert [block.name for block in probe.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [block.linked for block in probe.blocks] == [False, True, True]
    for block in probe.blocks:
        assert block.hidden_at == 0
        assert block.call.args == (HIDDEN,)
        assert set(block.call.kwargs) == {"mask", "scale"}
        assert block.keeps_shape
        assert not block.writes
    assert [probe.counts[module] for module in (model.layers[0].q, model.head)] == [1, 1]
    assert probe.gap[model.embed] == 0
    assert probe.gap[model.head] == 3


def test_writing_in_place_and_changing_the_shape_are_recorded():
    probe = probed(seeded(Stages).eval(), make_batches(1, 2, 3, 9, 9)[0], ("head",))
    assert [block.writes for block in probe.blocks] == [True] * 3
    assert [block.keeps_shape for block in probe.blocks] == [True, False, False]


def test_a_template_shows_who_reads_the_output_of_a_stub():
    probe = probed(seeded(Biased).eval(), make_batches(1, 2, 5, C)[0], ("blocks.0.lin",))
    hidden, bias = probe.blocks[0].template
    assert hidden.isnan().all()
    assert bias.isnan().all()
    assert probe.blocks[0].out_at == 0
