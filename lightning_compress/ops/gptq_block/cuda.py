"""Launches kernel.cu: one thread per row.

Shapes: R rows, b columns of the block, up to 128, G groups.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.ops import nvrtc
from lightning_compress.ops.gptq_block.grid import EXPONENT, MANTISSA, Grid
from lightning_compress.ops.gptq_block.operands import Block, Rounding

__all__ = ["SOURCE", "gptq_block_", "missing", "options", "padded"]

SOURCE = Path(__file__).with_name("kernel.cu").read_text()
THREADS = 64  # threads of a program; as in kernel.cu
ALIGNED = 32  # columns; a multiple of PANEL in kernel.cu
SHARED = 4 * (128 * 128 + 128 * THREADS)  # bytes; sm_89 has 101376


def missing(device: torch.device, grid: Grid | None, zero: bool, keep: bool) -> str | None:
    """Why the kernel does not run on this device; None if it does."""
    if torch.version.hip is not None:
        return "torch is built for ROCm"
    kernel = _kernel(device, tuple(options(grid, zero, keep)))
    return kernel if isinstance(kernel, str) else None


def options(grid: Grid | None, zero: bool, keep: bool) -> list[str]:
    """The options of NVRTC for one kind of grid."""
    bits = 0 if grid is None else grid.float_bits
    return [
        "--fmad=false",
        f"-DFORMAT={0 if grid is None else 2 if bits else 1}",
        f"-DZERO={int(zero and not bits)}",
        f"-DKEEP={int(keep)}",
        f"-DBF16={int(grid is not None and (grid.through_bf16 or grid.stored == torch.bfloat16))}",
        f"-DFP16={int(grid is not None and grid.stored == torch.float16)}",
        f"-DMANTISSA={MANTISSA.get(bits, 0)}",
        f"-DEXPONENT={EXPONENT.get(bits, 0)}",
    ]


def gptq_block_(block: Block, rounding: Rounding | None) -> None:
    """All columns of the block, float32; arguments as for :func:`lightning_compress.ops.gptq_block.gptq_block_`."""
    A_bR, Q_bR, D_bR, W_bR, U_bb, keep_bR = block
    grid, scale_GR, zero_GR, group_b = (None, None, None, None) if rounding is None else rounding
    kernel = _kernel(A_bR.device, tuple(options(grid, zero_GR is not None, keep_bR is not None)))
    assert isinstance(kernel, nvrtc.Kernel), kernel
    b, R = A_bR.shape
    U_pp, group_b = padded(U_bb), None if group_b is None else group_b.int()
    tensors = (A_bR, Q_bR, D_bR, W_bR, U_pp, scale_GR, zero_GR, group_b, keep_bR)
    low, high = (0.0, 0.0) if grid is None else (grid.low, grid.high)
    numbers: Sequence[ctypes._SimpleCData[int] | ctypes._SimpleCData[float]] = (
        ctypes.c_int(R), ctypes.c_int(b), ctypes.c_int(U_pp.stride(0)), ctypes.c_float(low), ctypes.c_float(high),
    )  # fmt: skip
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    p = -(-b // ALIGNED) * ALIGNED
    with torch.cuda.device(A_bR.device):
        kernel(-(-R // THREADS), THREADS, 4 * (p * p + p * THREADS), [*pointers, *numbers])


def padded(U_bb: Tensor) -> Tensor:
    """U with contiguous rows that begin at multiples of 16 bytes, padded with zeros to a multiple of 32 columns.

    U itself is returned where it has this layout.
    """
    b = len(U_bb)
    aligned = U_bb.stride(1) == 1 and U_bb.stride(0) % 4 == 0 and U_bb.data_ptr() % 16 == 0
    if aligned and b % ALIGNED == 0:
        return U_bb
    p = -(-b // ALIGNED) * ALIGNED
    U_pp = U_bb.new_zeros(p, p)
    U_pp[:b, :b] = U_bb
    return U_pp


@cache
def _kernel(device: torch.device, options: tuple[str, ...]) -> nvrtc.Kernel | str:
    """The kernel, or the reason why it does not run; both are cached."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        return nvrtc.load(SOURCE, "gptq_block", options, device, SHARED)
    except nvrtc.UnavailableError as error:
        return str(error)
