"""Freed memory goes back to the system, where the C library is glibc."""

import os
from pathlib import Path

import pytest
import torch

from lightning_compress.layers import memory
from tests.support.fake_libc import FakeLibrary


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_pieces_between_others_go_back_to_the_system():
    pieces = [torch.ones(2**16, dtype=torch.uint8) for _ in range(3200)]
    kept = pieces[::100]  # so that the heap cannot shrink from its end
    before = resident_bytes()
    del pieces
    memory.release()
    assert before - resident_bytes() > 150 * 2**20
    assert all(piece.all() for piece in kept)


def test_limits_in_the_environment_are_obeyed(monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with memory.small_heap():
        pass
    assert library.calls == []


def test_sizes_hold_inside_and_free_memory_goes_back_at_the_end(monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    with memory.small_heap(largest=2**23, keep=2**26):
        assert library.calls == [(-3, 2**23), (-1, 2**26)]
    assert library.calls[2:] == ["trim", (-3, 2**25), (-1, 2**26)]


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.release()
    with memory.small_heap():
        pass


def test_memory_is_returned_each_time_that_the_process_has_grown(monkeypatch):
    library, MiB = FakeLibrary(), 2**20
    sizes = iter([500, 490, 514, 515, 495, 506, 519, 519])
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    monkeypatch.setattr(memory, "resident", lambda: next(sizes) * MiB)
    release, trims = memory.GrowthRelease(), []
    for _ in range(6):
        release()
        trims.append(library.calls.count("trim"))
    assert trims == [1, 1, 2, 2, 2, 2]  # 515 is 25 more than 490; then 495 is the least, and 519 only 24 more
    monkeypatch.setattr(memory, "resident", lambda: None)  # not Linux
    release()
    assert library.calls.count("trim") == 3
