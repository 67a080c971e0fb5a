"""Times by replaying CUDA graphs: calls over rotated buffers, contestants in turn, medians over rounds."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, MutableMapping, Sequence

import torch

from benchmarks.checking import calls, first_line
from benchmarks.op_case import Call, Case, Trial

__all__ = ["captured", "elapsed", "in_turn", "rates", "rounds_of", "times"]

ROTATED = 200e6  # bytes that calls go round; L2 of an H200 holds 60 MB
SETS = 32  # at most so many sets of buffers
CALLS = 20  # at least so many calls in a graph, unless one alone goes round so many bytes
FEWEST = 7  # rounds, however long they take
GRAPH = 5e-3  # seconds of a graph; of slower calls there are fewer in it, but one at least
SECONDS = 0.5  # of rounds of a case, beyond the fewest
WARM_UP = 3  # rounds
HEAD_START = 200_000  # clock cycles (0.1 ms) that the GPU waits, so that launches are queued before the clock starts


def times(case: Case, device: torch.device, names: Collection[str], rounds: int) -> dict[str, float]:
    """Microseconds of a call: medians of :func:`rounds_of`."""
    return {name: statistics.median(values) for name, values in rounds_of(case, device, names, rounds).items()}


def rounds_of(
    case: Case,
    device: torch.device,
    names: Collection[str],
    rounds: int,
    left_out: MutableMapping[str, str] | None = None,
) -> dict[str, list[float]]:
    """Microseconds of a call, round by round; in each round each contestant's graph is replayed once.

    Args:
        case: The case.
        device: A CUDA device.
        names: Contestants, ``ours`` among them.
        rounds: At most so many.
        left_out: Where those contestants go that cannot be captured, with the reason; None: they raise.
    """
    count = min(SETS, max(1, math.ceil(ROTATED / case.moved)))
    sets = [calls(case.make(device, case.dtype, seed)) for seed in range(count)]
    repeats = max(1, CALLS // count) if case.moved < ROTATED else 1
    runs: dict[str, Callable[[], float]] = {}
    for name in names:
        run = [one[name] for one in sets] * repeats
        try:
            run[0]()  # compiles
            run = run[: max(1, math.ceil(GRAPH / elapsed(run[0])))]
            runs[name] = functools.partial(microseconds, captured(run), len(run))
        except Exception as error:
            if name == "ours" or left_out is None:
                raise
            left_out[name] = f"not captured: {first_line(error)}"
    return in_turn(runs, rounds, SECONDS)


def microseconds(replay: Callable[[], None], calls: int) -> float:
    """Of one of the calls that a graph holds."""
    return round(elapsed(replay) * 1e6 / calls, 3)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int, limit: float) -> dict[str, list[float]]:
    """What each run returned, in rounds in which each runs once, after some that warm up.

    Args:
        runs: By name.
        rounds: At most so many.
        limit: Seconds after which no further round begins, once there are enough.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.monotonic()
    for number in range(-WARM_UP, rounds):
        for name, run in runs.items():
            value = run()
            if number >= 0:
                found[name].append(value)
        if number >= FEWEST - 1 and time.monotonic() - begun > limit:
            break
    return found


def elapsed(run: Callable[[], object]) -> float:
    """Seconds of the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def captured(run: Sequence[Call]) -> Callable[[], None]:
    """Replays all the calls as one CUDA graph; kernels are compiled, and libraries chosen, before it is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in dict.fromkeys(run):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in run:
            call()
    return graph.replay


def rates(device: torch.device, rounds: int) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), FLOP per second of a bf16 product of random numbers."""
    size, side = 2**30, 8192

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
        x, y = torch.randn(2, side, side, device=device).to(dtype)
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return Trial(lambda: target.copy_(source), {"product": lambda: x @ y}, lambda: x)

    found = times(Case("rates", "", 2 * size, 2 * side**3, 0, make), device, ("ours", "product"), rounds)
    return 2 * size / found["ours"] * 1e6, 2 * side**3 / found["product"] * 1e6
