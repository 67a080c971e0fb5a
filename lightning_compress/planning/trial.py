"""Seconds and memory of a calibration, from trials on the first blocks and the first batch.

    seconds(n blocks, b batches) = start + n (solve + b pass)

    t1a, t1b, t2a   measured with 1 block and a batches, 1 block and b batches, 2 blocks and a batches
    pass  = (t1b - t1a) / (b - a)        what a batch costs outside of blocks counts as the block's
    solve = t2a - t1a - a pass           start = t1a - solve - a pass

The first trial only warms up, where there is time. So every technique is timed as it runs on this machine. Peak memory
is measured the same way; one block is at work at a time, so that it does not grow with blocks. A model without a list
of blocks is tried as a whole. An export takes as long as its bytes.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import BatchRunner
from lightning_compress.calibration.all_events import all_events
from lightning_compress.calibration.modes import calibration_mode
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.export.hugging_face import no_progress_bar
from lightning_compress.export.save import save
from lightning_compress.layers.blank import is_blank
from lightning_compress.layers.memory import release, resident
from lightning_compress.layers.split_experts import split_while
from lightning_compress.planning.copies import first_blocks
from lightning_compress.planning.sizes import model_bytes
from lightning_compress.structure.config import is_transformers

__all__ = ["Estimate", "estimate"]

BUDGET = 8.0  # seconds of all trials, on a machine that does nothing else: of CPU time by the number of threads
LARGEST = 2**31  # bytes of a model that is tried as a whole
MORE = 2  # batches of the second trial beside those of the first


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        calibration: Seconds.
        export: Seconds.
        forward: Seconds of one batch through the model.
        memory: Bytes beside the model while it is calibrated.
    """

    calibration: float
    export: float
    forward: float
    memory: int


@dataclass(frozen=True)
class Trial:
    """One calibration of a small model: seconds, bytes at the peak beside it, seconds of CPU time by threads."""

    seconds: float
    memory: int
    busy: float = 0.0
    export: float = 0.0
    forward: float = 0.0


def estimate(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    batch: Any,
    batches: int,
    options: CalibrationOptions,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Estimate | str:
    """What ``batches`` batches like ``batch`` will take; a sentence where trials cannot tell.

    The model stays as it is. ``modifiers`` are not initialized; they are copied for each trial.
    """
    small, blocks = first_blocks(model, 1), 1
    if small is not None:
        first, blocks = small
    elif any(is_blank(parameter) for parameter in model.parameters()) or model_bytes(model) > LARGEST:
        return "its blocks are not one list, and the whole is too large for a trial"
    else:
        first = model

    def run(copied: nn.Module, count: int, exports: bool = False) -> Trial:
        shared = None if batch is None else [batch] * count
        return _run(copied, modifiers, shared, options, forward, exports)

    few = 2 if any(modifier.needs.after_walk for modifier in modifiers) else 1  # of training one is held out
    many = few + min(MORE, max(0, batches - few)) if batch is not None else few
    one = run(deepcopy(first), few, exports=True)
    if one.busy * (many / few + 3) > BUDGET:
        many = min(few + 1, many)
    if one.busy * (many / few + 2) > BUDGET:
        return f"a trial on {'one block' if small else 'the model'} took {one.busy:.1f} s of CPU time"
    if one.busy * (many / few + 3) < BUDGET:
        one = run(deepcopy(first), few, exports=True)  # the first one has warmed up what is loaded and allocated once
    more = run(deepcopy(first), many) if many > few else one
    pair = first_blocks(model, 2)
    two = run(pair[0], few) if pair is not None else None
    step = max(0.0, more.seconds - one.seconds) / max(1, many - few)
    growth = max(0, more.memory - one.memory) / max(1, many - few)
    added = max(0.0, two.seconds - one.seconds) if two is not None else one.seconds
    solve = max(0.0, added - few * step)
    fixed = max(0.0, one.seconds - solve - few * step)
    block = max(0.0, two.forward - one.forward if two is not None else one.forward)
    return Estimate(
        calibration=fixed + blocks * (solve + batches * step),
        export=one.export * model_bytes(model) / max(1, model_bytes(first)),
        forward=one.forward + (blocks - 1) * block,
        memory=int(max(one.memory, more.memory) + max(0, batches - many) * growth),
    )


def _run(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    batches: list[Any] | None,
    options: CalibrationOptions,
    forward: Callable[[nn.Module, Any], Any] | None,
    exports: bool,
) -> Trial:
    lifecycle = Lifecycle([modifier.model_copy(deep=True) for modifier in modifiers])
    state = State(model=model, ledger=Ledger())
    seconds = 0.0
    if batches:
        with calibration_mode(model):
            began = time.monotonic()
            BatchRunner(model, forward)(batches[0])
            seconds = time.monotonic() - began
    release()
    began, used = time.monotonic(), time.process_time()
    with split_while(model), _peak() as peak, all_events(lifecycle, state, options.seed):
        if any(modifier.needs.calibration for modifier in modifiers):
            calibrate(lifecycle, state, batches, options, forward=forward)
    busy = (time.process_time() - used) / torch.get_num_threads()
    trial = Trial(time.monotonic() - began, peak[0], busy, forward=seconds)
    if not exports:
        return trial
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with no_progress_bar() if is_transformers(model) else nullcontext():
            save(model, Path(folder) / "trial")
        return replace(trial, export=time.monotonic() - began)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The largest growth of this process inside, in bytes, as the only item of a list; 0 where it cannot be told."""
    start, largest, end = resident() or 0, [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.002):
            largest[0] = max(largest[0], (resident() or start) - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        end.set()
        thread.join()
        largest[0] = max(largest[0], (resident() or start) - start)
