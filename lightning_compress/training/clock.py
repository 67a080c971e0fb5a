"""The clock of a training run: optimizer steps that were really made.

``trainer.global_step`` counts the steps of every optimizer, and those that fp16 scaling skipped. Here each optimizer
counts its own steps, in a hook that torch calls after a step was made; the clock is the largest count.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.events import Event, EventType

__all__ = ["StepClock"]


class StepClock:
    """Counts steps and batches, and dates events."""

    def __init__(self) -> None:
        self.steps: list[int] = []                     # of each optimizer
        self.batches = 0
        self.batches_per_step = 1
        self.steps_per_epoch: int | None = None
        self.total_steps: int | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def global_step(self) -> int:
        return max(self.steps, default=0)

    def event(self, type_: EventType | None = None) -> Event:
        """An event that happens now."""
        return Event(
            type_, self.global_step, self.batches, self.steps_per_epoch, self.total_steps, self.batches_per_step
        )

    def measure(self, batches: float, accumulate: int, epochs: int | None, max_steps: int, optimizers: int) -> None:
        """Work out the length of an epoch and of the run, in steps of one optimizer.

        Args:
            batches: Batches in an epoch; infinite for an endless loader.
            accumulate: Batches per step; the last, partial window of an epoch makes a step too.
            epochs: Epochs in the run; None or -1 without a limit.
            max_steps: Limit of the Trainer, which adds up the steps of all optimizers; -1 without a limit.
            optimizers: How many there are. Manual optimization may step as it likes: one step of each per batch is
                assumed.
        """
        self.batches_per_step = accumulate
        self.steps_per_epoch = math.ceil(batches / accumulate) if math.isfinite(batches) else None
        limits = [math.ceil(max_steps / max(optimizers, 1))] if max_steps >= 0 else []
        if self.steps_per_epoch is not None and epochs is not None and epochs >= 0:
            limits.append(epochs * self.steps_per_epoch)
        self.total_steps = min(limits, default=None)

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        before: Callable[[Optimizer], None],
        after: Callable[[Optimizer], None],
    ) -> None:
        """Count the steps of these optimizers from now on.

        Args:
            optimizers: Counts that were restored go to them in order.
            before: Called after each step that was made, before it is counted.
            after: Called once it is counted.
        """
        self.detach()
        self.steps = [*self.steps, *[0] * len(optimizers)][: len(optimizers)]

        def hook(index: int) -> Callable[..., None]:
            def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                before(optimizer)
                self.steps[index] += 1
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
