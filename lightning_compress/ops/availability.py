"""Whether Triton's kernels run on the device of a tensor; where they do not, a warning gives the reason."""

import importlib.metadata
import importlib.util
import re
import warnings
from functools import cache

import torch
from torch import Tensor

__all__ = ["KERNEL_DTYPES", "OLDEST", "calls_kernel", "kernel_runs", "triton_version"]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (3, 6)  # the first Triton that the kernels were compiled and interpreted with
CHAINS = (3, 9)  # the first one that chains products correctly on Blackwell
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")  # distributions that contain the module


def calls_kernel(x: Tensor) -> bool:
    """Whether a kernel is called for x directly: on CUDA, in eager mode, where nothing traces or wraps x."""
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def kernel_runs(device: torch.device, instead: str | None, unfit: str | None = None, *, chained: bool = False) -> bool:
    """Whether this CUDA device runs the kernel; when not, a warning says why (once, by Python's default filter).

    Args:
        device: A CUDA device.
        instead: Main clause of the warning: what happens without the kernel; None: no warning.
        unfit: Reason why the kernel cannot compute this case; None if it can.
        chained: The kernel chains products through one accumulator in a loop.
    """
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (pip install triton)"
    elif (version := triton_version()) is not None and version < OLDEST:
        installed, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
        reason = f"Triton {installed} is older than {oldest} (pip install -U triton)"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif chained and _chains_wrongly(device):
        installed, first = (".".join(map(str, numbers)) for numbers in (triton_version() or (), CHAINS))
        reason = f"Triton {installed} adds chained products wrongly on this GPU (pip install -U 'triton>={first}')"
    elif unfit is not None:
        reason = unfit
    else:
        return True
    if instead is not None:
        warnings.warn(f"{instead}, without a fused kernel: {reason}", stacklevel=4)
    return False


def _chains_wrongly(device: torch.device) -> bool:
    """Whether Triton pipelines products that are chained through one accumulator in a loop wrongly.

    It does before 3.9, with the tensor cores of Blackwell, for tiles of 64 rows and more (triton #10821; seen on
    compute capability 10.0 and 10.3).
    """
    version = triton_version()
    return version is not None and version < CHAINS and (10, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


@cache
def triton_version() -> tuple[int, ...] | None:
    """Major and minor version of the installed Triton; None if it is unknown."""
    for name in DISTRIBUTIONS:
        try:
            numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        return None if numbers is None else (int(numbers[1]), int(numbers[2]))
    return None
