"""Whether Triton's kernels run where a tensor is; where they do not, the reason is said."""

import importlib.util
import warnings

import torch
from torch import Tensor

__all__ = ["calls_kernel", "kernel_runs"]


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
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif unfit is not None:
        reason = unfit
    else:
        return True
    warnings.warn(f"{instead}, without a fused kernel: {reason}", stacklevel=4)
    return False
