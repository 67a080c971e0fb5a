"""int4 weights on the CPU: torch's bf16 kernel, which reads 4-bit weights.

Its float32 variant is many times slower than a dense product, so the weight is dense for float32 tokens. Measured times
are in the README beside this file.

Shapes: N output features, K input features, G groups of K / G columns.
"""

import torch
from torch import Tensor

from lightning_compress.ops.w4a16_gemm.reference import SYMMETRIC_ZERO, unpack, unpack_zero

__all__ = ["gemm_bf16", "prepare_bf16", "takes_bf16"]


def takes_bf16(N: int, K: int, G: int) -> bool:
    """Whether torch's kernel supports this weight; it does not always report a wrong shape."""
    return N % 16 == 0 and K % G == 0 and K // G in (32, 64, 128, 256)


def prepare_bf16(weight_packed: Tensor, scale_NG: Tensor, zero_packed: Tensor | None, K: int) -> tuple[Tensor, Tensor]:
    """Torch's layout: uint8 [N, K / 2], and bf16 [G, N, 2] of scale s and offset o, W = s (code - 8) + o."""
    codes_NK = unpack(weight_packed, K).int()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
    offset_NG = torch.zeros_like(scale_NG)
    if zero_packed is not None:
        offset_NG = (SYMMETRIC_ZERO - unpack_zero(zero_packed, len(scale_NG))) * scale_NG
    return words, torch.stack([scale_NG.t(), offset_NG.t()], -1).bfloat16()


def gemm_bf16(x: Tensor, words: Tensor, grid_GN2: Tensor) -> Tensor:
    """The product x W^T, [..., N], of bf16 tokens [..., K]; no gradient."""
    K, (G, N, _) = x.shape[-1], grid_GN2.shape
    y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, K), words, K // G, grid_GN2)
    return y_MN.view(*x.shape[:-1], N)
