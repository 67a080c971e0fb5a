"""The Triton kernel: a thread compares four scores in pairs and keeps those that exceed two of the other three.

Scores are read and bytes are written in order, neighbours by neighbouring threads. Runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching

__all__ = ["mask_2of4", "mask_kernel"]

FOURS = 512  # groups of four scores in a program: 4 groups for each thread


def mask_2of4(score_RC: Tensor) -> Tensor:
    """Bool [R, C]; scores float16, bfloat16 or float32, C a multiple of four."""
    score_RC = score_RC.contiguous()
    out = torch.empty_like(score_RC, dtype=torch.bool)
    total = score_RC.numel()
    with launching(score_RC):
        mask_kernel[(triton.cdiv(total, 4 * FOURS),)](score_RC, out.view(torch.uint8), total, BLOCK=FOURS, num_warps=4)
    return out


@triton.jit
def mask_kernel(score_ptr, out_ptr, total, BLOCK: tl.constexpr):
    at_B4 = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]) * 4 + tl.arange(0, 4)[None, :]
    score_B4 = tl.load(score_ptr + at_B4, mask=at_B4 < total, other=0.0).to(tl.float32)
    score_B4 = tl.where(score_B4 != score_B4, float("inf"), score_B4)
    even_B2, odd_B2 = tl.split(tl.reshape(score_B4, (BLOCK, 2, 2)))  # 0 and 2, 1 and 3
    s0, s2 = tl.split(even_B2)
    s1, s3 = tl.split(odd_B2)
    keep0 = (s0 > s1).to(tl.int32) + (s0 > s2).to(tl.int32) + (s0 > s3).to(tl.int32) >= 2
    keep1 = (s1 >= s0).to(tl.int32) + (s1 > s2).to(tl.int32) + (s1 > s3).to(tl.int32) >= 2
    keep2 = (s2 >= s0).to(tl.int32) + (s2 >= s1).to(tl.int32) + (s2 > s3).to(tl.int32) >= 2
    keep3 = (s3 >= s0).to(tl.int32) + (s3 >= s1).to(tl.int32) + (s3 >= s2).to(tl.int32) >= 2
    keep_B4 = tl.reshape(tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3)), (BLOCK, 4))
    tl.store(out_ptr + at_B4, keep_B4.to(tl.uint8), mask=at_B4 < total)
