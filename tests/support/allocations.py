"""What torch allocates on the CPU during a call, counted instead of resident memory, which depends on the heap."""

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that torch allocated on the CPU, at the peak and by the largest allocation, and the result."""
    gc.collect()  # what earlier tests left would count as freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, max(event.nbytes() for event in events), result
