"""Whether Triton's kernels run where a tensor is; where they do not, the reason is said."""

import importlib.metadata
import importlib.util
import re
import warnings
from functools import cache

import torch
from torch import Tensor

__all__ = ["OLDEST", "calls_kernel", "kernel_runs", "triton_version"]

OLDEST = (3, 6)  # the first Triton that the kernels were compiled and interpreted with
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")  # that bring the module


def calls_kernel(x: Tensor) -> bool:
    """Whether a kernel is called for x right away: on CUDA, in eager mode, where nothing traces or wraps x."""
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def kernel_runs(device: torch.device, instead: str, unfit: str | None = None) -> bool:
    """Whether this CUDA device runs the kernel; when not, a warning says why (once, by Python's default filter).

    Args:
        device: A CUDA device.
        instead: What happens without the kernel, as a main clause.
        unfit: Why the kernel does not take the case at hand, if it does not.
    """
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (pip install triton)"
    elif (version := triton_version()) is not None and version < OLDEST:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
        reason = f"Triton {found} is older than {oldest} (pip install -U triton)"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif unfit is not None:
        reason = unfit
    else:
        return True
    warnings.warn(f"{instead}, without a fused kernel: {reason}", stacklevel=4)
    return False


@cache
def triton_version() -> tuple[int, ...] | None:
    """Of the Triton that is installed, major and minor; None where it does not say."""
    for name in DISTRIBUTIONS:
        try:
            found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        return None if found is None else (int(found[1]), int(found[2]))
    return None
