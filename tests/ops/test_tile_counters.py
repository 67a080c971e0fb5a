"""Counters that launches share by stream, and that captured launches have for themselves."""

import torch

from lightning_compress.ops.tile_counters import PER_STREAM, TileCounters, tile_counters

CPU = torch.device("cpu")


def addresses(*tensors):
    """The memory of each tensor, as ranges."""
    return [range(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]


def overlap(first, second):
    a, b = addresses(first, second)
    return a.start < b.stop and b.start < a.stop


def test_launches_of_a_stream_share_counters_and_streams_do_not():
    counters = TileCounters(CPU, 4 * PER_STREAM)
    first, again, other = (counters.take(64, stream, False) for stream in (7, 7, 8))
    assert first.data_ptr() == again.data_ptr()
    assert len(first) >= 64
    assert first.dtype == torch.int32
    assert not overlap(first, other)
    assert counters.take(PER_STREAM, 7, False).data_ptr() == first.data_ptr()


def test_a_device_has_one_set_of_counters():
    assert tile_counters(CPU) is tile_counters(torch.device("cpu"))
    assert tile_counters(CPU).take(PER_STREAM, 7, False).eq(0).all()


def test_a_captured_launch_has_counters_of_its_own():
    counters = TileCounters(CPU, 4 * PER_STREAM)
    eager = counters.take(64, 7, False)
    captured = [counters.take(64, 7, True) for _ in range(3)]
    for n, one in enumerate(captured):
        assert len(one) == 64
        assert not any(overlap(one, other) for other in [eager, *captured[:n], counters.take(64, 8, False)])


def test_where_none_are_left_a_launch_gets_new_zeros():
    counters = TileCounters(CPU, PER_STREAM + 100)
    eager = counters.take(64, 7, False)
    last = counters.take(100, 7, True)
    for new in (counters.take(1, 7, True), counters.take(64, 8, False), counters.take(PER_STREAM + 1, 7, False)):
        assert new.eq(0).all()
        assert not overlap(new, eager)
        assert not overlap(new, last)
    assert counters.take(64, 7, False).data_ptr() == eager.data_ptr()
