"""The memory that programs of a launch share: parts of the sums, and counters of their stream or of their capture."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")

from lightning_compress.ops import split_sums
from lightning_compress.ops.tile_counters import TileCounters


class OnCuda:
    """As much of a CUDA tensor as is asked for."""

    is_cuda, device = True, torch.device("cpu")


def test_a_product_that_is_not_split_needs_none():
    assert split_sums.workspace(torch.zeros(5, 64), 5, 17, 1, 2) == (None, None)


def test_off_cuda_every_launch_has_its_own():
    parts, counters = split_sums.workspace(torch.zeros(5, 64, dtype=torch.float16), 5, 17, 3, 2)
    assert (parts.shape, parts.dtype) == ((3, 5, 17), torch.float32)
    assert counters.tolist() == [0, 0]


def test_counters_are_those_of_the_stream_but_in_a_capture(monkeypatch):
    state = SimpleNamespace(stream=7, capturing=False)
    pool = TileCounters(torch.device("cpu"), 1 << 14)
    monkeypatch.setattr(split_sums, "tile_counters", lambda device: pool)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)

    def address():
        return split_sums.workspace(OnCuda(), 5, 17, 2, 3)[1].data_ptr()

    first = address()
    assert address() == first
    state.stream = 8
    assert address() != first
    state.stream, state.capturing = 7, True
    captured = [address(), address()]
    assert len({first, *captured}) == 3
    state.capturing = False
    assert address() == first
