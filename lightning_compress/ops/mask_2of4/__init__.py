"""The 2:4 mask of a matrix of scores: of every four neighbours in a row it keeps the two highest.

On CUDA a Triton kernel compares them in registers; elsewhere torch sorts. README beside this file.

Shapes: R rows, C columns, a multiple of four.
"""

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.mask_2of4 import reference
from lightning_compress.ops.registration import register_op

__all__ = ["mask_2of4"]


def mask_2of4(score_RC: Tensor) -> Tensor:
    """Bool [R, C], True where the weight is kept; of equal scores the later one is kept, NaN is the highest.

    Args:
        score_RC: Scores, any floating dtype.

    Raises:
        ValueError: C is not a multiple of four, or the scores are not floating.
    """
    if score_RC.ndim != 2 or score_RC.shape[1] % 4 or not score_RC.is_floating_point():
        raise ValueError(
            f"expected floating scores [R, C], C a multiple of 4, got {score_RC.dtype} {tuple(score_RC.shape)}; "
            f"add the layer to ignore, or choose another pattern"
        )
    if score_RC.is_cuda and not calls_kernel(score_RC):
        keep_RC: Tensor = _mask_op(score_RC.detach())
        return keep_RC
    return _mask(score_RC)


def _mask(score_RC: Tensor) -> Tensor:
    if score_RC.is_cuda and score_RC.dtype in KERNEL_DTYPES and score_RC.numel() and _kernel_runs(score_RC.device):
        from lightning_compress.ops.mask_2of4 import kernel

        return kernel.mask_2of4(score_RC)
    return reference.mask_2of4(score_RC)


def _kernel_runs(device: torch.device) -> bool:
    return kernel_runs(device, "scores of 2:4 masks are sorted by torch")


_mask_op = register_op(
    "mask_2of4", "(Tensor score) -> Tensor", _mask, lambda score: score.new_empty(score.shape, dtype=torch.bool)
)
