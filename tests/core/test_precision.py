"""What handlers and hooks find, and what the user's model finds, whatever the precision outside."""

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.core import Event, Lifecycle, Modifier, State
from lightning_compress.core.events import EventType
from lightning_compress.core.precision import model_precision, plain_precision


def now() -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a new tensor, and of a product of float32 matrices."""
    one = torch.eye(2, dtype=torch.float32)
    return torch.empty(0).dtype, (one @ one).dtype


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


PLAIN = (torch.float32, torch.float32)


def test_both_nest_and_put_everything_back(default):
    with torch.autocast("cpu", torch.bfloat16):
        assert now() == (default, torch.bfloat16)
        with plain_precision():
            assert now() == PLAIN
            with plain_precision(), model_precision():
                assert now() == (default, torch.bfloat16)
                with plain_precision():
                    assert now() == PLAIN
            assert now() == PLAIN
        assert now() == (default, torch.bfloat16)
        with pytest.raises(KeyError), plain_precision():
            raise KeyError
        assert now() == (default, torch.bfloat16)
        with model_precision():
            assert now() == (default, torch.bfloat16)
        with plain_precision(), model_precision(exact=True):
            assert now() == (default, torch.float32)
        with model_precision(exact=True):
            assert now() == (default, torch.float32)
        assert now() == (default, torch.bfloat16)
    assert now() == (default, torch.float32)


class Looking(Modifier):
    def on_initialize(self, state: State, **kwargs: object) -> bool:
        state.ledger.append(("initialize", now()))
        self.hook(state.model, lambda _m, _args: state.ledger.append(("hook", now())))
        return True

    def on_event(self, state: State, event: Event, **kwargs: object) -> None:
        state.ledger.append(("event", now()))
        with model_precision():
            state.model(torch.zeros(1))

    def on_finalize(self, state: State, **kwargs: object) -> bool:
        state.ledger.append(("finalize", now()))
        return True


class Model(nn.Module):
    def __init__(self, seen: list):
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(("model", now()))
        return x


def test_handlers_and_hooks_are_plain_and_the_model_is_not(default):
    seen: list = []
    state, lifecycle = State(model=Model(seen), ledger=seen), Lifecycle([Looking()])
    outside = (default, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        lifecycle.initialize(state)
        state.model(torch.zeros(1))
        lifecycle.emit(state, Event(EventType.BATCH_START))
        lifecycle.finalize(state)
    assert seen == [
        ("initialize", PLAIN), ("hook", PLAIN), ("model", outside), ("event", PLAIN), ("hook", PLAIN),
        ("model", outside), ("finalize", PLAIN),
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_handlers_multiply_in_float32_and_the_model_as_the_user_has_set_it(precision):
    seen: list = []

    class Noting(Looking):
        def on_event(self, state: State, event: Event, **kwargs: object) -> None:
            seen.append(torch.get_float32_matmul_precision())
            with model_precision():
                seen.append(torch.get_float32_matmul_precision())
            raise KeyError

    state, lifecycle = State(model=nn.Linear(1, 1), ledger=[]), Lifecycle([Noting()])
    torch.set_float32_matmul_precision(precision)
    try:
        lifecycle.initialize(state)
        with pytest.raises(KeyError):
            lifecycle.emit(state, Event(EventType.BATCH_START))
        assert seen == ["highest", precision]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
