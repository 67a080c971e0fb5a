"""The clock of a training run: the optimizer steps that were made.

``trainer.global_step`` counts the steps of every optimizer, and those that fp16 scaling skipped. Here each optimizer
counts its own steps, in a hook that torch calls after a step was made; the clock is the largest count.

In manual optimization a batch may hold no step or several, so epochs and fractions of the run go by batches there.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.events import Event, EventType

__all__ = ["StepClock"]


class StepClock:
    """Counts steps and batches, and makes events with them."""

    def __init__(self) -> None:
        self.steps: list[int] = []  # of each optimizer
        self.batches = 0
        self.batches_per_step = 1
        self.steps_per_epoch: int | None = None
        self.total_steps: int | None = None
        self.manual = False
        self.max_steps = -1
        self._last_step_in = -1  # the batch in which the last step was made
        self._handles: list[RemovableHandle] = []

    @property
    def global_step(self) -> int:
        return max(self.steps, default=0)

    def event(self, type_: EventType | None = None) -> Event:
        """An event of this moment."""
        step, batches, accumulate = self.global_step, self.batches, self.batches_per_step
        if not self.manual:
            return Event(type_, step, batches, self.steps_per_epoch, self.total_steps, accumulate)
        closing = type_ in (EventType.OPTIM_POST_STEP, EventType.BATCH_END)
        stepped = type_ != EventType.BATCH_START and self._last_step_in == batches
        passed = batches + int(closing or stepped)
        return Event(type_, step, batches, self.steps_per_epoch, self._total_batches(passed), accumulate, passed=passed)

    def _total_batches(self, passed: int) -> float | Fraction | None:
        """Batches of a run in manual optimization; ``max_steps`` ends it, at the rate of steps per batch so far."""
        if self.max_steps < 0:
            return self.total_steps
        steps = sum(self.steps)
        by_steps = Fraction(passed * self.max_steps, steps) if steps else math.inf
        return by_steps if self.total_steps is None else min(self.total_steps, by_steps)

    def measure(
        self,
        batches: float,
        accumulate: int,
        epochs: int | None,
        max_steps: int,
        optimizers: int,
        *,
        manual: bool = False,
    ) -> None:
        """Work out the length of an epoch and of the run, in steps of one optimizer; in manual optimization in batches.

        Args:
            batches: Batches in an epoch; infinite for an endless loader.
            accumulate: Batches per step; the last, partial window of an epoch makes a step too.
            epochs: Epochs in the run; None or -1 without a limit.
            max_steps: Limit of the Trainer, which adds up the steps of all optimizers; -1 without a limit.
            optimizers: Number of optimizers.
            manual: Whether ``training_step`` makes the steps itself.
        """
        self.batches_per_step, self.manual, self.max_steps = accumulate, manual, max_steps
        self.steps_per_epoch = math.ceil(batches / accumulate) if math.isfinite(batches) else None
        limits = [math.ceil(max_steps / max(optimizers, 1))] if max_steps >= 0 and not manual else []
        if self.steps_per_epoch is not None and epochs is not None and epochs >= 0:
            limits.append(epochs * self.steps_per_epoch)
        self.total_steps = min(limits, default=None)

    def measure_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As :meth:`measure`, with the numbers of a Trainer in its on_train_start."""
        self.measure(
            trainer.num_training_batches,
            trainer.accumulate_grad_batches,
            trainer.max_epochs,
            trainer.max_steps,
            len(trainer.optimizers),
            manual=not pl_module.automatic_optimization,
        )

    def attach(
        self, optimizers: Sequence[Optimizer], before: Callable[[Optimizer], None], after: Callable[[Optimizer], None]
    ) -> None:
        """Count the steps of these optimizers from now on.

        Args:
            optimizers: The optimizers, in the order of the counts that were restored.
            before: Called after each step that was made, before it is counted.
            after: Called once it is counted.
        """
        self.detach()
        self.steps = [*self.steps, *[0] * len(optimizers)][: len(optimizers)]

        def hook(index: int) -> Callable[..., None]:
            def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                before(optimizer)
                self.steps[index] += 1
                self._last_step_in = self.batches
                after(optimizer)

            return stepped

        for index, optimizer in enumerate(optimizers):
            if not isinstance(optimizer, Optimizer):
                self.detach()
                raise ValueError(
                    f"optimizer {index} is a {type(optimizer).__name__}, expected a torch.optim.Optimizer: "
                    f"its steps cannot be seen otherwise (register_step_post_hook)"
                )
            self._handles.append(optimizer.register_step_post_hook(hook(index)))

    def detach(self) -> None:
        """Take the hooks off the optimizers; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.batches = list(state["steps"]), state["batches"]
