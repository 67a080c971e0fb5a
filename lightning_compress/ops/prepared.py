"""Kernels that are launched again and again with one grid: what Triton looks up for a launch is looked up once.

A launch through ``kernel[grid](...)`` binds its arguments and looks for the compiled kernel by their types, and by
which of them are 1 or multiples of 16; that takes longer than a product with one token takes on a GPU.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Call", "PreparedKernel", "call_key"]

Call = tuple[Any, ...]
"""What calls must have in common to share prepared kernels."""


def call_key(x: Tensor) -> Call:
    """The properties of contiguous x by which launches, and compiled kernels, differ."""
    return x.shape, x.dtype, x.device, x.data_ptr() % 16


class PreparedKernel:
    """A Triton kernel with its grid and its compile-time arguments, which are the last ones of its signature.

    From call to call pointers may differ, but for their alignment to 16 bytes; numbers may not.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Number of programs along three axes.
        constants: Compile-time arguments, in the order of the signature.
        options: ``num_warps`` and others.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], constants: Mapping[str, Any], **options: int):
        self._kernel, self._grid, self._options = kernel, grid, {**constants, **options}
        self._constants = tuple(constants.values())
        self._run: Any = None

    def __call__(self, *args: Any) -> None:
        """Launch it, on the current stream of the current device."""
        if self._run is not None:
            self._run(*args, *self._constants)
            return
        compiled = self._kernel[self._grid](*args, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[self._grid]
