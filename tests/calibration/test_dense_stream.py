"""State.dense: what each block gave in the dense model, beside the inputs that come from compressed blocks."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lightning_compress.calibration import calibrate
from lightning_compress.core import Event, Needs, State
from tests.support.calibration_models import Watcher, started


class Block(nn.Module):
    """Returns what ``form`` says; writes into its input where that says so."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(8, 8), form

    def forward(self, x: Tensor) -> Any:
        if self.form == "in place":
            return x.add_(torch.tanh(self.fc(x)))
        y = x + torch.tanh(self.fc(x))
        return {"tuple": (y, x.mean()), "behind": (x.mean(), y)}.get(self.form, y)


class Model(nn.Module):
    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(form) for _ in range(3))

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The output of every block."""
        found, x = [], self.stem(x)
        for block in self.blocks:
            out = block(x)
            x = out if isinstance(out, Tensor) else out[1] if block.form == "behind" else out[0]
            found.append(x.clone())
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[-1])


class Comparer(Watcher):
    """At BLOCK_END, before it halves the block's weight: the dense outputs, and what a replay gives."""

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True, dense_outputs=True)
    dense: dict[str, Any] = Field(default_factory=dict)
    now: dict[str, list[Any]] = Field(default_factory=dict)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        seen = {name: len(inputs) for name, inputs in self.inputs.items()}
        self.dense[state.block_name] = state.dense and [state.dense(i).clone() for i in range(state.batches)]
        self.now[state.block_name] = [state.replay(i) for i in range(state.batches)] if state.replay else []
        assert {name: len(inputs) for name, inputs in self.inputs.items()} == seen
        for module in state.modules.values():
            if isinstance(module, nn.Linear) and state.block is not None:
                module.weight.data *= 0.5


BATCHES = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@torch.no_grad()
def run(form: str, comparer: Watcher) -> tuple[Model, Model]:
    model = Model(form)
    calibrate(*started(comparer, model=model), BATCHES)
    return model, Model(form)


def test_dense_outputs_are_those_of_the_dense_model():
    for form in ("plain", "tuple", "in place"):
        comparer = Comparer(targets=["Linear"])
        model, dense = run(form, comparer)
        for i, batch in enumerate(BATCHES):
            with torch.no_grad():
                expected, after = dense.hidden(batch), model.hidden(batch)
            for number in range(3):
                torch.testing.assert_close(comparer.dense[f"blocks.{number}"][i], expected[number])
            assert not torch.allclose(expected[2], after[2])  # it is not what the walk goes on with
        assert comparer.dense[""] is None


def test_the_first_block_has_seen_nothing_compressed():
    comparer = Comparer(targets=["Linear"])
    run("plain", comparer)
    for dense, now in zip(comparer.dense["blocks.0"], comparer.now["blocks.0"], strict=True):
        assert torch.equal(dense, now)
    assert not torch.equal(comparer.dense["blocks.1"][0], comparer.now["blocks.1"][0])


def test_none_where_the_hidden_state_is_not_the_first_number_that_comes_out():
    comparer = Comparer(targets=["Linear"])
    run("behind", comparer)
    assert comparer.dense["blocks.0"] is comparer.dense["blocks.1"] is None  # of the last, nobody takes it


def test_nobody_asks_nothing_is_run():
    class Incurious(Comparer):
        needs: ClassVar[Needs] = Needs(data=True, own_pass=True)

    comparer = Incurious(targets=["Linear"])
    run("plain", comparer)
    assert set(comparer.dense.values()) == {None}


class Looker(Watcher):
    """Keeps the inputs that its hooks see in dense passes apart from all others."""

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True, dense_inputs=True)
    of_dense: dict[str, list[Tensor]] = Field(default_factory=dict)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.dense_pass:
            self.of_dense.setdefault(self._names[module], []).append(args[0].clone())
        else:
            super().see(module, args)


def test_hooks_see_the_inputs_of_dense_blocks_where_they_are_needed():
    looker, other = Looker(targets=["re:.*fc"]), Watcher(targets=["re:.*fc"], change=False)
    model = Model("plain")
    with torch.no_grad():
        calibrate(*started(looker, other, model=model), BATCHES)
    assert looker.of_dense.keys() == {f"blocks.{i}.fc" for i in range(3)}
    dense = Model("plain")
    for number, seen in enumerate(looker.of_dense.values()):
        for i, batch in enumerate(BATCHES):
            with torch.no_grad():
                before = dense.hidden(batch)[number - 1] if number else dense.stem(batch)
            torch.testing.assert_close(seen[i], before)
    assert len(looker.inputs["blocks.2.fc"]) == len(other.inputs["blocks.2.fc"]) == len(BATCHES)
    assert not torch.allclose(looker.inputs["blocks.2.fc"][0], looker.of_dense["blocks.2.fc"][0])
    assert not looker.dense_pass
