import pytest
import torch
from torch import nn

from lightning_compress.calibration.all_events import all_events
from lightning_compress.core import EventType, Lifecycle, Modifier, State


class Noting(Modifier):
    def on_initialize(self, state, **kwargs):
        self.hook(state.model, lambda *_: None, "forward")
        state.ledger.add("model", "noting", flag=f"drew {torch.rand(1).item()}")
        return True


def test_events_come_in_order_and_the_random_state_stays():
    modifier, state = Noting(), State(model=nn.Linear(2, 2))
    lifecycle, before = Lifecycle([modifier]), torch.get_rng_state()
    with all_events(lifecycle, state, seed=3):
        assert modifier.initialized
        assert lifecycle.last == EventType.TRAINING_END
    assert modifier.finalized
    assert torch.equal(torch.get_rng_state(), before)
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    assert state.ledger.rows[0].flags == [f"drew {drawn}"]


def test_an_error_inside_removes_the_hooks():
    modifier, state = Noting(), State(model=nn.Linear(2, 2))
    with pytest.raises(KeyError), all_events(Lifecycle([modifier]), state, seed=0):
        raise KeyError("stop")
    assert not modifier.finalized
    assert not state.model._forward_hooks
