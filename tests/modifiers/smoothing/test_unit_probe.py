"""Units of a block, recorded runs, and probes that show which inputs a scaled source reaches."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress.modifiers.smoothing.unit_probe import find_units, probe, record, relative_change
from tests.support.smoothing_models import C, Plain


def recorded(block):
    x = torch.randn(2, 3, C)

    def run():
        with torch.no_grad():
            return block(x)

    units = find_units(dict(block.named_modules()))
    return record(units, run), run


def test_units_are_the_modules_that_hold_parameters():
    block = nn.Sequential(Plain(nn.ReLU()))
    block.register_parameter("shift", nn.Parameter(torch.zeros(C)))  # has children with parameters
    assert set(find_units(dict(block.named_modules()))) == {"0.norm", "0.fc1", "0.fc2"}


def test_a_recording_has_the_calls_in_order_and_copies_of_their_tensors():
    block = Plain(nn.ReLU(inplace=True))
    recording, run = recorded(block)
    assert list(recording.calls) == ["norm", "fc1", "fc2"]
    (fc1,), (fc2,) = recording.calls["fc1"], recording.calls["fc2"]
    assert_close(fc1.output.relu(), fc2.main_input)
    assert fc1.output.min() < 0  # the ReLU writes into the tensor of the model
    assert_close(recording.output, run())
    assert record(recording.units, run, inputs=False).calls["fc2"][0].main_input is None


def test_a_scaled_source_reaches_the_next_unit_and_nothing_behind_it():
    recording, run = recorded(Plain(nn.ReLU()))
    factor = torch.exp2(torch.arange(C) % 3).float()
    changed, leaks = probe(recording, run, "norm", factor)
    assert list(changed) == ["fc1"]
    assert not leaks
    assert_close(changed["fc1"][0], recording.calls["fc1"][0].main_input * factor)
    assert probe(recording, run, "norm", torch.ones(C)) == ({}, False)


def test_a_source_that_reaches_the_output_of_the_block_leaks():
    recording, run = recorded(Plain(nn.ReLU()))
    assert probe(recording, run, "fc2", torch.full((C,), 2.0)) == ({}, True)


def test_a_run_that_calls_other_units_leaks():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.a(h) if h.abs().max() < 50 else self.b(h)

    recording, run = recorded(Fork())
    assert probe(recording, run, "norm", torch.full((C,), 64.0))[1]
    assert not probe(recording, run, "norm", torch.full((C,), 2.0))[1]


@pytest.mark.parametrize(("before", "after", "change"), [
    (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]), 0.2),
    ((torch.ones(2), torch.ones(2)), (torch.ones(2), torch.tensor([1.0, 3.0])), 2**0.5),
    (torch.zeros(2), torch.ones(2), float("inf")),
    (torch.ones(2), torch.ones(3), float("inf")),
    (torch.ones(2), (torch.ones(2), torch.ones(2)), float("inf")),
    (torch.tensor([1, 2]), torch.tensor([3, 4]), 0.0),
    (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
])  # fmt: skip
def test_relative_change(before, after, change):
    assert relative_change(before, after) == pytest.approx(change)
