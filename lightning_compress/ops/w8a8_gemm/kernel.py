"""The Triton kernels: int8 products in the tensor cores with scales at the end, and tokens to int8 in one launch.

out^T = W X^T, as in w4a16_gemm: the features of a tile are the rows that wgmma wants, also where there is one token.
Both operands lie with k innermost, as wgmma wants int8. Parts of k are added up as integers, so that any split gives
the same.

Shapes: M tokens, N output features, K input features; runs under Triton 3.6 to 3.9.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.w8a8_gemm.reference import HALF_RANGE

__all__ = ["Launch", "gemm", "gemm_kernel", "quantize_kernel", "quantize_tokens", "rule"]


@dataclass(frozen=True)
class Launch:
    """Tile of block_m tokens and block_n features, block_k columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    warps: int
    stages: int


def rule(M: int, N: int, K: int, processors: int) -> Launch:
    """Small tiles while memory bounds the product, k split until every processor has a tile; not measured yet."""
    few = M <= 64
    block_m, block_n = min(max(16, 1 << (M - 1).bit_length()), 128), 64 if few else 128
    tiles, blocks, split = triton.cdiv(M, block_m) * triton.cdiv(N, block_n), triton.cdiv(K, 128), 1
    while tiles * split < processors and blocks >= 2 * split * 4:      # each part keeps 4 blocks
        split *= 2
    return Launch(block_m, block_n, 128, split, warps=4 if few else 8, stages=4 if few else 3)


def gemm(
    codes_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype,
    launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``dtype``; arguments as ``w8a8_gemm`` checks them."""
    (M, K), N = codes_MK.shape, len(weight_NK)
    if launch is None:
        launch = rule(M, N, K, torch.cuda.get_device_properties(codes_MK.device).multi_processor_count)
    whole = launch.split == 1
    out = torch.empty((launch.split, M, N), dtype=dtype if whole else torch.int32, device=codes_MK.device)
    grid = (triton.cdiv(N, launch.block_n), triton.cdiv(M, launch.block_m), launch.split)
    per_part = triton.cdiv(triton.cdiv(K, launch.block_k), launch.split) * launch.block_k
    gemm_kernel[grid](
        codes_MK, weight_NK, scale_M, scale_N, out, M, N, K, per_part, WHOLE=whole, BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out[0] if whole else (out.sum(0, dtype=torch.int32) * scale_N * scale_M[:, None]).to(dtype)


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales float32 [M], of x float16, bfloat16 or float32."""
    x_MK = x_MK.contiguous()
    M, K = x_MK.shape
    codes = torch.empty((M, K), dtype=torch.int8, device=x_MK.device)
    scale_M = torch.empty((M,), dtype=torch.float32, device=x_MK.device)
    quantize_kernel[(M,)](x_MK, codes, scale_M, K, HALF_RANGE, BLOCK=min(triton.next_power_of_2(K), 4096), num_warps=8)
    return codes, scale_M


@triton.jit
def gemm_kernel(
    codes_ptr, weight_ptr, scale_m_ptr, scale_n_ptr, out_ptr, M, N, K, per_part,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token_M = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part = tl.program_id(2)
    column_K = tl.arange(0, BLOCK_K)
    rows, tokens = row_N < N, token_M < M
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(part * per_part, tl.minimum((part + 1) * per_part, K), BLOCK_K):
        columns = k + column_K < K
        w_NK = tl.load(
            weight_ptr + row_N[:, None] * K + (k + column_K)[None, :], mask=rows[:, None] & columns[None, :], other=0
        )
        x_KM = tl.load(
            codes_ptr + token_M[None, :] * K + (k + column_K)[:, None], mask=tokens[None, :] & columns[:, None], other=0
        )
        sums_NM = tl.dot(w_NK, x_KM, sums_NM, out_dtype=tl.int32)
    inside = rows[:, None] & tokens[None, :]
    at_NM = out_ptr + (part.to(tl.int64) * M + token_M[None, :]) * N + row_N[:, None]
    if WHOLE:
        s_N = tl.load(scale_n_ptr + row_N, mask=rows, other=0.0)
        s_M = tl.load(scale_m_ptr + token_M, mask=tokens, other=0.0)
        tl.store(at_NM, (sums_NM * s_N[:, None] * s_M[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(at_NM, sums_NM, mask=inside)


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, scale_ptr, K, half_range, BLOCK: tl.constexpr):
    """One token; what it reads twice lies in L2 by then."""
    start = tl.program_id(0).to(tl.int64) * K
    largest_B = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K, BLOCK):
        column_B = k + tl.arange(0, BLOCK)
        x_B = tl.load(x_ptr + start + column_B, mask=column_B < K, other=0.0).to(tl.float32)
        largest_B = tl.maximum(largest_B, tl.abs(x_B))
    largest = tl.max(largest_B, 0)
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, half_range))
    tl.store(scale_ptr + tl.program_id(0), scale)
    for k in range(0, K, BLOCK):
        column_B = k + tl.arange(0, BLOCK)
        x_B = tl.load(x_ptr + start + column_B, mask=column_B < K, other=0.0).to(tl.float32)
        v_B = tl.div_rn(x_B, tl.broadcast_to(scale, x_B.shape))
        q_B = tl.minimum(tl.maximum((v_B + 12582912.0) - 12582912.0, -128.0), 127.0)         # to nearest, ties to even
        tl.store(codes_ptr + start + column_B, q_B.to(tl.int8), mask=column_B < K)
