"""Adam on the knobs, whole calibration batches at a time; of all epochs the best by batches that are held out.

A step takes a group of batches in a fixed order. Each rank runs those that are its own, and gradients add up over
ranks: the result does not depend on their number. After each epoch knobs and moments go to the log of the calibration.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core import State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.forward import gradients_for
from lightning_compress.layerwise.short_descent import set_rate, short_adam
from lightning_compress.modifiers.tune.knobs import Knob, gradients_to
from lightning_compress.team import Team

__all__ = ["Settings", "Tuned", "held_out_batches", "tune"]

MOMENTS = "exp_avg", "exp_avg_sq"
TITLE = "tuning of knobs"


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Args:
        epochs: At most.
        rate: lr.
        accumulate: Batches of one step.
        patience: Epochs in a row without a gain that end it.
        seed: Of the order of batches.
    """

    epochs: int
    rate: float
    accumulate: int
    patience: int
    seed: int


@dataclass
class Tuned:
    """Loss on the held-out batches before, then after each epoch; the best epoch, 0: none."""

    losses: list[float] = field(default_factory=list)
    best: int = 0


def held_out_batches(count: int, share: float) -> list[int]:
    """Numbers of the batches that are held out: at least one, spread over all; at least one is left."""
    size = min(max(1, round(share * count)), count - 1)
    return [(2 * i + 1) * count // (2 * size) for i in range(size)]


def tune(
    model: nn.Module,
    knobs: Sequence[Knob],
    loss: Callable[[int], Tensor],
    numbers: tuple[Sequence[int], Sequence[int]],
    how: Settings,
    state: State,
) -> Tuned:
    """Train the knobs; the model is left with those of the best epoch, or as it was.

    Args:
        model: The model; gradients of its parameters are used up.
        knobs: What is trained.
        loss: The mean loss of the batch of that number, which is this rank's.
        numbers: Batches to train on, and those that are held out, of all ranks.
        how: Settings.
        state: State of the calibration: its ranks, which step together, and what may end the run between two steps.
    """
    training, held_out = numbers
    descent = _Descent(knobs, how.rate)
    if (stored := state.restore(TITLE)) is None:
        descent.tuned.losses.append(_mean_loss(held_out, loss, state.team))
    else:
        descent.load(*stored)
    groups, tuned = math.ceil(len(training) / how.accumulate), descent.tuned
    random = torch.Generator().manual_seed(how.seed)
    orders = [torch.randperm(len(training), generator=random, device="cpu").tolist() for _ in range(how.epochs)]
    tensors = [tensor for knob in knobs for tensor in knob.tensors]
    with gradients_for(model, tensors), gradients_to(knobs, several=how.accumulate > 1):
        while (epoch := len(tuned.losses) - 1) < min(how.epochs, tuned.best + how.patience):
            shuffled = [training[i] for i in orders[epoch]]
            for group in range(groups):
                state.interrupt()
                set_rate(descent.optimizer, how.rate, epoch * groups + group, how.epochs * groups)
                _step(knobs, shuffled[group * how.accumulate :][: how.accumulate], loss, descent.optimizer, state.team)
            descent.note(_mean_loss(held_out, loss, state.team))
            state.store(TITLE, *descent.state())
    descent.take_best()
    return tuned


class _Descent:
    """Knobs, their moments, and the best of them so far."""

    def __init__(self, knobs: Sequence[Knob], rate: float):
        self.knobs, self.tuned = knobs, Tuned()
        self.changes = [knob.change for knob in knobs]
        self.best: list[Tensor] | None = None  # none is better than zeros
        self.optimizer = short_adam(self.changes, rate)

    def note(self, loss: float) -> None:
        """An epoch has ended with this loss on the held-out batches."""
        self.tuned.losses.append(loss)
        if loss < self.tuned.losses[self.tuned.best]:
            self.tuned.best = len(self.tuned.losses) - 1
            self.best = self.best or [torch.empty_like(change) for change in self.changes]
            for best, change in zip(self.best, self.changes, strict=True):
                best.copy_(change)

    def take_best(self) -> None:
        """Write the best knobs into the model."""
        for i, knob in enumerate(self.knobs):
            knob.change.zero_() if self.best is None else knob.change.copy_(self.best[i])
            knob.write()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, as tensors and facts; the tensors are not copied."""
        moments = [self.optimizer.state[change] for change in self.changes]
        lists = {"change": self.changes, "best": self.best or []} | {key: [m[key] for m in moments] for key in MOMENTS}
        tensors = {f"{key}.{i}": tensor for key, values in lists.items() for i, tensor in enumerate(values)}
        return tensors, {"losses": self.tuned.losses, "best": self.tuned.best, "steps": float(moments[0]["step"])}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """What :meth:`state` gave; the model gets the knobs."""
        self.tuned.losses, self.tuned.best = list(facts["losses"]), facts["best"]
        if self.tuned.best:
            self.best = [tensors[f"best.{i}"].to(change) for i, change in enumerate(self.changes)]
        for i, knob in enumerate(self.knobs):
            steps = torch.tensor(facts["steps"], dtype=torch.float32, device="cpu")
            moments = {key: tensors[f"{key}.{i}"].to(knob.change) for key in MOMENTS}
            self.optimizer.state[knob.change] = {"step": steps} | moments
            knob.change.copy_(tensors[f"change.{i}"])
            knob.write()


def _step(
    knobs: Sequence[Knob],
    numbers: Sequence[int],
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    team: Team,
) -> None:
    for number in numbers:
        if number % team.size == team.rank:
            with torch.enable_grad():
                value = loss(number)
            with model_precision():  # blocks are computed again on the way back
                value.backward()
    for knob in knobs:
        team.reduce_(knob)
        knob.change.grad = knob.sum.div_(len(numbers)).float()
    optimizer.step()
    for knob in knobs:
        knob.sum.zero_()  # it may be the gradient
        knob.change.grad = None
        knob.write()


def _mean_loss(numbers: Sequence[int], loss: Callable[[int], Tensor], team: Team) -> float:
    with torch.no_grad():
        losses = [float(loss(number)) for number in numbers if number % team.size == team.rank]
    total = SimpleNamespace(
        sum=torch.tensor(math.fsum(losses), dtype=torch.float64, device="cpu"), reduce={"sum": "sum"}
    )
    team.reduce_(total)
    return float(total.sum) / len(numbers)
