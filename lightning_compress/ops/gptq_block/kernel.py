"""The Triton kernel, used where NVRTC is missing: a tile of all columns of some rows, a loop over its columns.

A masked sum reads a column out of the tile; it is exact, since all other terms are zero. Multiplications and additions
of rounding must not be contracted, so fusing is off, and errors are added by an explicit multiply-add.

Shapes: R rows, B columns of the block, a power of two, up to 128. Runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl

from lightning_compress.ops.gptq_block.grid import EXPONENT, MANTISSA, Grid
from lightning_compress.ops.gptq_block.operands import Block, Rounding
from lightning_compress.ops.launches import launching

__all__ = ["BLOCK_R", "constants", "gptq_block_", "gptq_kernel"]

BLOCK_R = 16  # rows of a program


def gptq_block_(block: Block, rounding: Rounding | None) -> None:
    """All columns of the block, float32; arguments as for :func:`lightning_compress.ops.gptq_block.gptq_block_`."""
    A_bR, Q_bR, D_bR, W_bR, U_bb, keep_bR = block
    grid, scale_GR, zero_GR, group_b = (None, None, None, None) if rounding is None else rounding
    b, R = A_bR.shape
    low, high = (0.0, 0.0) if grid is None else (grid.low, grid.high)
    keep = None if keep_bR is None else keep_bR.view(torch.uint8)
    with launching(A_bR):
        gptq_kernel[(triton.cdiv(R, BLOCK_R),)](
            A_bR, Q_bR, D_bR, W_bR, U_bb, scale_GR, zero_GR, group_b, keep, R, b, U_bb.stride(0), U_bb.stride(1), low,
            high, **constants(b, grid, zero_GR is not None, keep_bR is not None), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def constants(b: int, grid: Grid | None, zero: bool, keep: bool) -> dict[str, int]:
    """The compile-time arguments of the kernel."""
    bits = 0 if grid is None else grid.float_bits
    return {
        "GRID": int(grid is not None),
        "ZERO": int(zero),
        "KEEP": int(keep),
        "FLOAT": int(bits > 0),
        "MANTISSA": MANTISSA.get(bits, 0),
        "EXPONENT": EXPONENT.get(bits, 0),
        "BF16": int(grid is not None and (grid.through_bf16 or grid.stored == torch.bfloat16)),
        "FP16": int(grid is not None and grid.stored == torch.float16),
        "B": max(16, triton.next_power_of_2(b)),
        "BLOCK_R": BLOCK_R,
    }


@triton.jit
def gptq_kernel(
    a_ptr, q_ptr, d_ptr, w_ptr, u_ptr, scale_ptr, zero_ptr, group_ptr, keep_ptr, R, b, stride_k, stride_j, low, high,
    GRID: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, FLOAT: tl.constexpr, MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr, B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c_B = tl.arange(0, B)
    rows = r_R < R
    at_BR = c_B[:, None] * R + r_R[None, :]
    a_BR = tl.load(a_ptr + at_BR, mask=(c_B < b)[:, None] & rows[None, :], other=0.0)
    for j in range(b):
        a_R = tl.sum(tl.where((c_B == j)[:, None], a_BR, 0.0), 0)
        w_R = tl.load(w_ptr + j * R + r_R, mask=rows, other=0.0)
        q_R = a_R
        if GRID:
            at_R = tl.load(group_ptr + j).to(tl.int64) * R + r_R
            s_R = tl.load(scale_ptr + at_R, mask=rows, other=1.0)
            v_R = tl.div_rn(a_R, s_R)
            if ZERO:
                z_R = tl.load(zero_ptr + at_R, mask=rows, other=0.0)
                v_R = v_R + z_R
            v_R = tl.where(v_R < low, low, v_R)  # before rounding: the bounds are on the grid
            v_R = tl.where(v_R > high, high, v_R)
            if FLOAT:
                v_R = _to_float(v_R, MANTISSA, EXPONENT)
            else:
                v_R = _even(v_R)
            if ZERO:
                v_R = v_R - z_R
            q_R = v_R * s_R
            if BF16:
                bits = q_R.to(tl.int32, bitcast=True)
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
                q_R = tl.where(q_R == q_R, bits.to(tl.float32, bitcast=True), q_R)
            if FP16:
                q_R = q_R.to(tl.float16).to(tl.float32)
        if KEEP:
            keep_R = tl.load(keep_ptr + j * R + r_R, mask=rows, other=0)
            q_R = tl.where(keep_R != 0, q_R, 0.0)
        d_R = w_R - q_R
        tl.store(q_ptr + j * R + r_R, q_R, mask=rows)
        tl.store(d_ptr + j * R + r_R, d_R, mask=rows)
        u_B = tl.load(u_ptr + j * stride_k + c_B * stride_j, mask=(c_B > j) & (c_B < b), other=0.0)
        a_BR = tl.fma(tl.broadcast_to(u_B[:, None], (B, BLOCK_R)), tl.broadcast_to(d_R[None, :], (B, BLOCK_R)), a_BR)
    tl.store(a_ptr + at_BR, a_BR, mask=(c_B < b)[:, None] & rows[None, :])


@triton.jit
def _even(v):
    """The nearest integer, ties to even; |v| below 2^22."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _to_float(v, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):
    """The nearest number of a format, ties to even; |v| is within its range."""
    exponent = tl.maximum(((v.to(tl.int32, bitcast=True) >> 23) & 255) - 127, EXPONENT) - MANTISSA
    up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return _even(v * up) * down
