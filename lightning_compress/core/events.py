r"""The events that modifiers act on, and their clock.

One run, every event in its place::

    INITIALIZE                          # before optimizers exist: set up masks, scales, fake-quantization
    for batch in training:
        BATCH_START
        loss = training_step(batch)
        LOSS_CALCULATED                 # a modifier may add to the loss in place
        loss.backward()
        OPTIM_PRE_STEP                  # only when the optimizer will step
        optimizer.step()
        OPTIM_POST_STEP                 # only when it did: not while gradients accumulate, not when AMP skips
        BATCH_END
    TRAINING_END                        # once, also when no training took place; modifiers without data act
    CALIBRATION_START                   # only if a modifier calibrates: hooks are set
    BLOCK_SURVEYED                      # per block, for modifiers that survey: all batches went through the dense model
    for block in model's blocks:
        every batch through the block
            MODULE_READY                # one-pass walk only: these modules have seen all their inputs
        BLOCK_END                       # the block has seen all its inputs
    CALIBRATION_END                     # hooks are removed; targets without data are named
    FINALIZE

An :class:`Event` carries the clock. Three units measure it: optimizer steps, epochs (steps / steps_per_epoch)
and the fraction of the whole run (steps / total_steps). In manual optimization a batch may hold no step or several:
there epochs and fractions are measured in batches.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Literal

__all__ = ["Event", "EventType", "Unit"]

Unit = Literal["step", "epoch", "fraction"]


class EventType(StrEnum):
    """The events, in the order of the module docstring."""

    INITIALIZE = "initialize"
    BATCH_START = "batch_start"
    LOSS_CALCULATED = "loss_calculated"
    OPTIM_PRE_STEP = "optim_pre_step"
    OPTIM_POST_STEP = "optim_post_step"
    BATCH_END = "batch_end"
    TRAINING_END = "training_end"
    CALIBRATION_START = "calibration_start"
    BLOCK_SURVEYED = "block_surveyed"
    MODULE_READY = "module_ready"
    BLOCK_END = "block_end"
    CALIBRATION_END = "calibration_end"
    FINALIZE = "finalize"


@dataclass(frozen=True)
class Event:
    """One event and the clock at that moment.

    Args:
        type_: Type of the event.
        global_step: Optimizer steps made before this moment (skipped fp16 steps do not count).
        global_batch: Training batches started before this one.
        steps_per_epoch: Optimizer steps in an epoch; None where it is unknown (an endless loader).
        total_steps: Optimizer steps in the whole run; None where it is unknown.
        batches_per_step: Batches that make one optimizer step (gradient accumulation).
        unit: What :attr:`current_index` counts: ``step``, ``epoch`` or ``fraction`` (of the run).
        passed: Training batches that are over, the one included in which a step was made. Given in manual optimization
            alone: epochs and fractions are measured in it, and ``steps_per_epoch`` and ``total_steps`` count batches.
    """

    type_: EventType | None = None
    global_step: int = 0
    global_batch: int = 0
    steps_per_epoch: int | None = None
    total_steps: float | Fraction | None = None
    batches_per_step: int = 1
    unit: Unit = "step"
    passed: int | None = None

    def in_unit(self, unit: Unit) -> "Event":
        """The same event with its index counted in another unit."""
        return self if unit == self.unit else replace(self, unit=unit)

    @property
    def steps_per_unit(self) -> float | Fraction:
        """Optimizer steps (or batches, see ``passed``) in one :attr:`unit`. ValueError where that is unknown."""
        if self.unit == "step":
            return 1
        name = "steps_per_epoch" if self.unit == "epoch" else "total_steps"
        length: float | Fraction | None = getattr(self, name)
        if not length:
            raise ValueError(
                f"unit={self.unit!r} needs a known {name}, which this run does not have "
                f"(an endless loader?); use unit='step', or give the Trainer limit_train_batches / max_steps"
            )
        return length

    @property
    def current_index(self) -> float:
        """The clock in this event's :attr:`unit`; 0 before the first step, whatever the unit."""
        count = self.global_step if self.passed is None or self.unit == "step" else self.passed
        return float(count / self.steps_per_unit) if count else 0.0

    @property
    def epoch(self) -> int:
        """Whole epochs that have passed. ValueError past step 0 when ``steps_per_epoch`` is unknown."""
        return math.floor(self.epoch_full)

    @property
    def epoch_full(self) -> float:
        """Epochs that have passed, with the fraction. ValueError past step 0 when ``steps_per_epoch`` is unknown."""
        return self.in_unit("epoch").current_index

    def due_count(self, start: float, update: float) -> int:
        """How many update points ``start + k * update`` (k >= 0) lie at or before now.

        Counting points, instead of testing ``index % update == 0``, never misses one that falls between two steps.
        """
        passed = (self.current_index - start) / update
        return math.floor(passed + 1e-9) + 1 if passed > -1e-9 else 0

    def should_update(self, start: float | None, end: float | None, update: float | None) -> bool:
        """True when an update point lies in the step that led to now, inside ``[start, end]``."""
        now, begin = self.current_index, 0.0 if start is None else start
        if now < begin - 1e-9 or (end is not None and now > end + 1e-9):
            return False
        if not update or update <= 0:
            return True
        if not now:
            return self.due_count(begin, update) > 0
        passed = self.passed - 1 if self.passed else self.passed
        before = replace(self, global_step=max(self.global_step - 1, 0), passed=passed)
        return self.due_count(begin, update) > before.due_count(begin, update)
