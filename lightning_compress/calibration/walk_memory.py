"""Whether one pass fits into memory: in lockstep all batches wait at a module together, with their activations.

    bytes = 1.25 * (tokens * sum of the inputs of a block's targets and its hidden state + 12 C^2 + 20 R C)

The largest block counts; C^2 and R C are the statistic and the solution of GPTQ for the targets that share one input.
A Llama block of H hidden and I inner columns takes I + 4 H numbers per token. The 1.25 is fitted to a synthetic model,
333 MB where 287 to 335 MB were measured. On CUDA each waiting batch has a thread, and so a workspace of cuBLAS.

Shapes: R rows of the targets of one input, C columns.
"""

import os
from pathlib import Path

import torch
from torch import nn

from lightning_compress.calibration.activations import device_of
from lightning_compress.calibration.probe import Probe
from lightning_compress.layers.memory import bytes_of

__all__ = ["lockstep_bytes", "megabytes", "memory_limit", "workspace_bytes"]

SHARE = 0.6  # of the device, without the model
HEAPS = 1.25  # of what is alive: allocators keep some of what is freed
WORKSPACE = (8 << 20, 32 << 20)  # torch's default for cuBLAS before compute capability 9.0, and from it on


def lockstep_bytes(probe: Probe, numbers: int) -> int:
    """Memory of one pass over batches with so many numbers: those of all ranks, whose count must not change results."""
    times = numbers / max(1, probe.numbers)
    return int(HEAPS * max((size * times + work for size, work in probe.memory.values()), default=0.0))


def workspace_bytes(device: torch.device | None, batches: int) -> int:
    """Memory of cuBLAS for the threads of so many batches."""
    if device is None or device.type != "cuda":
        return 0
    return batches * WORKSPACE[torch.cuda.get_device_capability(device) >= (9, 0)]


def memory_limit(limit: int | str | None, model: nn.Module, device: torch.device | None) -> int:
    """Bytes that a walk may take; None: a share of the device's memory that the model leaves.

    Not of what is free at the moment: that differs from run to run, and the results of both walks differ.
    """
    if limit is not None:
        return bytes_of(limit)
    device = device or device_of(model) or torch.device("cpu")
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _memory_of_machine()
    weights = sum(p.nbytes for p in model.parameters() if p.device == device)
    return int(SHARE * max(0, total - weights))


def megabytes(size: int) -> str:
    """Such as ``1,200 MB``."""
    return f"{size / 10**6:,.0f} MB"


def _memory_of_machine() -> int:
    """Memory of this machine, or of this process's control group, as in a container or a job of SLURM."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for folder in _control_groups():
        text = (folder / "memory.max").read_text().strip() if (folder / "memory.max").is_file() else "max"
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes, default=2**62)


def _control_groups() -> list[Path]:
    groups, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    lines = groups.read_text().splitlines() if groups.is_file() else []
    group = next((root / line[3:].lstrip("/") for line in lines if line.startswith("0::")), root)
    return [folder for folder in (group, *group.parents) if folder == root or root in folder.parents]
