"""Adam on the knobs, whole calibration batches at a time; of all epochs the best by batches that are held out.

    rate of step k of K:  lr (1 + cos(pi k / K)) / 2        beta2 = 0.95: a run has few steps

A step takes a group of batches in a fixed order. Each rank runs those that are its own, and gradients add up over
ranks: the result does not depend on their number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lightning_compress.core import State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.forward import gradients_for
from lightning_compress.modifiers.tune.knobs import Knob, gradients_to
from lightning_compress.team import Team

__all__ = ["Settings", "Tuned", "held_out_batches", "tune"]

BETAS = 0.9, 0.95


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
    team = state.team
    result = Tuned([_mean_loss(held_out, loss, team)])
    best = [knob.change.clone() for knob in knobs]
    optimizer = torch.optim.Adam([knob.change for knob in knobs], lr=how.rate, betas=BETAS)
    groups = math.ceil(len(training) / how.accumulate)
    order = torch.Generator().manual_seed(how.seed)
    with gradients_for(model, [knob.parameter for knob in knobs]), gradients_to(knobs):
        for epoch in range(how.epochs):
            shuffled = [training[i] for i in torch.randperm(len(training), generator=order, device="cpu").tolist()]
            for group in range(groups):
                state.interrupt()
                progress = (epoch * groups + group) / (how.epochs * groups)
                optimizer.param_groups[0]["lr"] = how.rate * (1 + math.cos(math.pi * progress)) / 2
                _step(knobs, shuffled[group * how.accumulate :][: how.accumulate], loss, optimizer, team)
            result.losses.append(_mean_loss(held_out, loss, team))
            if result.losses[-1] < result.losses[result.best]:
                result.best, best = epoch + 1, [knob.change.clone() for knob in knobs]
            elif epoch + 1 - result.best >= how.patience:
                break
    for knob, change in zip(knobs, best, strict=True):
        knob.change.copy_(change)
        knob.write()
    return result


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
        knob.change.grad = (knob.sum / len(numbers)).float()
        knob.sum.zero_()
    optimizer.step()
    for knob in knobs:
        knob.write()


def _mean_loss(numbers: Sequence[int], loss: Callable[[int], Tensor], team: Team) -> float:
    with torch.no_grad():
        losses = [float(loss(number)) for number in numbers if number % team.size == team.rank]
    total = SimpleNamespace(
        sum=torch.tensor(math.fsum(losses), dtype=torch.float64, device="cpu"), reduce={"sum": "sum"}
    )
    team.reduce_(total)
    return float(total.sum) / len(numbers)
