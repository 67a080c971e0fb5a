"""Counters that are 0 whenever a kernel starts: programs that share a tile count themselves, the last resets them.

A launch on a stream uses the counters of that stream, since launches of a stream run one after the other. A launch that
is captured into a CUDA graph gets counters that no other launch uses, since graphs may be replayed on any stream, but
never twice at a time. So no launch has to clear them first.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

__all__ = ["PER_STREAM", "POOL", "TileCounters", "tile_counters"]

POOL = 1 << 18  # 1 MB; a graph of a Llama-3-8B with split products uses about 15,000
PER_STREAM = 1024  # the most tiles of a launch; a launch with more fills the processors without a split


@cache
def tile_counters(device: torch.device) -> "TileCounters":
    """The counters of a CUDA device, for the life of the process.

    Another thread makes them: if this one is warming up a graph, its memory comes from the pool of the graph, from
    which nothing may be kept.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(TileCounters, device, POOL).result()


class TileCounters:
    """Zeros of one device, handed out by stream and by captured launch.

    Args:
        device: A CUDA device.
        size: Number of counters, for the life of the process.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._zeros = torch.zeros(size, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams read them
        self._free = 0
        self._streams: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, tiles: int, stream: int, capturing: bool) -> Tensor:
        """Zeros int32 [tiles] or more for one launch; where none are left, new ones, which costs a second launch."""
        if not capturing and tiles <= PER_STREAM and (counters := self._streams.get(stream)) is not None:
            return counters
        with self._lock:
            size = tiles if capturing else PER_STREAM
            if size < tiles or self._free + size > len(self._zeros):
                return torch.zeros(tiles, dtype=torch.int32, device=self._zeros.device)
            counters = self._zeros[self._free : self._free + size]
            self._free += size
            if not capturing:
                counters = self._streams.setdefault(stream, counters)
        return counters
