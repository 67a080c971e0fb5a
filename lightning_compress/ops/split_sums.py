"""Sums of programs that split the columns, added within their kernel, in a fixed order: results are reproducible.

Each program writes its float32 sums of a tile and counts itself; the one that is last to do so adds all parts, from the
first to the last, and writes the tile in the dtype of the result. No program waits for another.

Shapes: M tokens, N output features; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.tile_counters import tile_counters

__all__ = ["store_sums", "workspace"]


def workspace(x: Tensor, M: int, N: int, split: int, tiles: int) -> tuple[Tensor | None, Tensor | None]:
    """Parts float32 [split, M, N] and counters of a launch on the device of x; None where nothing is split."""
    if split == 1:
        return None, None
    parts = torch.empty((split, M, N), dtype=torch.float32, device=x.device)
    if not x.is_cuda:
        return parts, torch.zeros(tiles, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    counters = tile_counters(x.device).take(tiles, stream, torch.cuda.is_current_stream_capturing())
    return parts, counters


@triton.jit
def store_sums(sums_NM, out_ptr, parts_ptr, counter_ptr, M, N, row_N, token_M, SPLIT: tl.constexpr):
    """Write a tile to out [M, N]; SPLIT programs, those of axis 2 of the grid, hold parts of its sums."""
    inside = (row_N < N)[:, None] & (token_M < M)[None, :]
    at_NM = token_M.to(tl.int64)[None, :] * N + row_N[:, None]
    if SPLIT == 1:
        tl.store(out_ptr + at_NM, sums_NM.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(parts_ptr + tl.program_id(2).to(tl.int64) * M * N + at_NM, sums_NM, mask=inside)
        tl.debug_barrier()  # all threads have written before one of them counts
        counter_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total_NM = tl.zeros(sums_NM.shape, tl.float32)
            for s in tl.static_range(SPLIT):  # .cg: past the L1, which other processors do not write
                part_ptr = parts_ptr + tl.cast(s, tl.int64) * M * N
                total_NM += tl.load(part_ptr + at_NM, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at_NM, total_NM.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(counter_ptr, 0)
