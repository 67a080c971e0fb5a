"""A Triton driver without a GPU: kernels are compiled for an H200, and their launches are noted, not run.

    with fake_triton() as launches:
        layer(x)                     # tensors on the CPU count as tensors on CUDA
    assert len(launches) == 1

The values of results are undefined.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

__all__ = ["fake_triton"]


class Utilities:
    """Those of the driver that a launch needs."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class Driver(CudaDriver):
    def __init__(self, launches: list[tuple[Any, ...]]):
        self.utils, self.launches = Utilities(), launches
        self.launcher_cls = lambda source, metadata: launch
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=0: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch(*arguments: Any) -> None:
    driver.active.launches.append(arguments)  # kernels stay compiled from one driver to the next


@contextmanager
def fake_triton() -> Iterator[list[tuple[Any, ...]]]:
    """Inside, Triton has a GPU; yields the arguments of each launch: grid, stream, function, ..., of the kernel."""
    launches: list[tuple[Any, ...]] = []
    properties = mock.Mock(multi_processor_count=132, major=9, minor=0)
    properties.name = "NVIDIA H200"
    stream = mock.Mock(cuda_stream=0)
    patches = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "current_stream": lambda device=None: stream,
        "current_device": lambda: None,  # the index of torch.device("cpu")
        "is_current_stream_capturing": lambda: False,
    }
    before = driver._active
    with ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,method-assign]
        driver.set_active(Driver(launches))
        try:
            yield launches
        finally:
            driver._active = before
            del torch.Tensor.is_cuda
