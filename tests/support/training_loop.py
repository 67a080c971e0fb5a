"""A training loop by hand that emits every event, for modifiers that act while a model trains."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State


def train(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    steps: int,
    *,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    after_step: Callable[[int], None] = lambda step: None,
    lifecycle: Lifecycle | None = None,
) -> Lifecycle:
    """Steps ``first`` .. ``steps``; batches depend on the step alone, so a resumed run sees the same ones."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    if lifecycle is None:
        lifecycle = Lifecycle(modifiers)
        lifecycle.initialize(State(model=model))
    state = State(model=model, optimizer=optimizer)
    model.train()
    for step in range(first, steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            clock = {"global_batch": step * accumulate + micro, "batches_per_step": accumulate, "total_steps": steps}
            generator = torch.Generator().manual_seed(step * accumulate + micro)
            x = torch.randn(32, 16, generator=generator)
            y = torch.randint(0, 8, (32,), generator=generator)
            lifecycle.emit(state, Event(EventType.BATCH_START, step, **clock))
            loss = nn.functional.cross_entropy(model(x), y) / accumulate
            lifecycle.emit(state.but(loss=loss), Event(EventType.LOSS_CALCULATED, step, **clock))
            loss.backward()
            done = step
            if micro == accumulate - 1:
                lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, step, **clock))
                optimizer.step()
                done = step + 1
                lifecycle.emit(state, Event(EventType.OPTIM_POST_STEP, done, **clock))
                after_step(done)
            lifecycle.emit(state, Event(EventType.BATCH_END, done, **clock))
    return lifecycle


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
