"""The Triton kernels: quantize and dequantize in one pass, and all gradients in another.

The matrix is treated as lines of the columns that share one scale (per tensor: lines of any length, all of one scale).
A program processes a few lines, tile by tile. All arithmetic is in float32, and the same as torch's: division rounds
correctly, nothing is fused into a multiply-add. One program adds up the sums of a line; results are reproducible.

Integers are rounded by adding and subtracting 1.5 * 2^23, exact to nearest even below 2^22. Floats are rounded in the
same way, with that number times the spacing at v: of E4M3 2^(e - 3), and 2^-9 below 2^-6; of E2M1 2^(e - 1), of E2M3
2^(e - 3), and that of 1 below 1; no conversion of a GPU or of the interpreter is needed.

Shapes: L lines of g columns; blocks of BLOCK_L lines, BLOCK_C columns; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching

__all__ = ["blocks", "clamp", "gradient_kernel", "gradients", "round_code", "value", "value_kernel"]

WARPS = 4
FLAT = 1024  # columns of a line where the tensor has one scale


def value(
    W_RC: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: float,
    high: float,
    float_bits: int = 0,
    through_bf16: bool = False,
) -> Tensor:
    """W^ [R, C] in the dtype of W, float16, bfloat16 or float32; other arguments as in the reference."""
    W_RC = W_RC.contiguous()
    out = torch.empty_like(W_RC)
    L, g = _lines(W_RC, scale)
    block_l, block_c = blocks(g)
    with launching(W_RC):
        value_kernel[(triton.cdiv(L, block_l),)](
            W_RC, scale.contiguous(), None if zero is None else zero.contiguous(), out, W_RC.numel(), L, g,
            float(low), float(high), TENSOR=scale.ndim == 1, HAS_ZERO=zero is not None, FLOAT_BITS=float_bits,
            THROUGH_BF16=through_bf16, BLOCK_L=block_l, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    return out


def gradients(
    gradient_RC: Tensor,
    W_RC: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: float,
    high: float,
    float_bits: int,
    beyond: float | None,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of W [R, C], in the dtype of the gradient of W^, and of the scale, float32 and not divided.

    A gradient that is not needed is None. ``beyond``: distance beyond the grid up to which the gradient of W is 1,
    inclusive; None: 1 strictly inside (LSQ). Other arguments as in the reference.
    """
    W_RC, gradient_RC = W_RC.contiguous(), gradient_RC.contiguous()
    of_W = torch.empty_like(gradient_RC) if needed[0] else None
    L, g = _lines(W_RC, scale)
    of_lines = torch.empty(L, dtype=torch.float32, device=W_RC.device) if needed[1] else None
    block_l, block_c = blocks(g)
    with launching(W_RC):
        gradient_kernel[(triton.cdiv(L, block_l),)](
            W_RC, scale.contiguous(), None if zero is None else zero.contiguous(), gradient_RC, of_W, of_lines,
            W_RC.numel(), L, g, float(low), float(high), float(beyond or 0), TENSOR=scale.ndim == 1,
            HAS_ZERO=zero is not None, FLOAT_BITS=float_bits, INCLUSIVE=beyond is not None, OF_W=needed[0],
            OF_SCALE=needed[1], BLOCK_L=block_l, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    if of_lines is None:
        return of_W, None
    return of_W, of_lines.sum().view(1) if scale.ndim == 1 else of_lines.view(scale.shape)


def blocks(g: int) -> tuple[int, int]:
    """Lines and columns of a tile: 2048 numbers, 16 for each thread."""
    block_c = min(triton.next_power_of_2(g), 1024)
    return 2048 // block_c, block_c


def _lines(W_RC: Tensor, scale: Tensor) -> tuple[int, int]:
    if scale.ndim == 1:
        return triton.cdiv(W_RC.numel(), FLAT), FLAT
    return scale.numel(), W_RC.numel() // scale.numel()


@triton.jit
def value_kernel(
    w_ptr, s_ptr, z_ptr, out_ptr, total, L, g, low, high,
    TENSOR: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT_BITS: tl.constexpr, THROUGH_BF16: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    line_L = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    s_L, z_L = _grid(s_ptr, z_ptr, line_L, L, TENSOR, HAS_ZERO)
    for c in range(0, g, BLOCK_C):
        at_LC, inside_LC = _tile(line_L, c, total, L, g, BLOCK_C)
        w_LC = tl.load(w_ptr + at_LC, mask=inside_LC, other=0.0).to(tl.float32)
        v_LC = tl.div_rn(w_LC, tl.broadcast_to(s_L[:, None], w_LC.shape)) + z_L[:, None]
        q_LC = (round_code(clamp(v_LC, low, high), FLOAT_BITS) - z_L[:, None]) * s_L[:, None]
        if THROUGH_BF16:
            q_LC = q_LC.to(tl.bfloat16).to(tl.float32)
        tl.store(out_ptr + at_LC, q_LC.to(out_ptr.dtype.element_ty), mask=inside_LC)


@triton.jit
def gradient_kernel(
    w_ptr, s_ptr, z_ptr, gradient_ptr, of_w_ptr, of_lines_ptr, total, L, g, low, high, beyond,
    TENSOR: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT_BITS: tl.constexpr, INCLUSIVE: tl.constexpr,
    OF_W: tl.constexpr, OF_SCALE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    line_L = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    s_L, z_L = _grid(s_ptr, z_ptr, line_L, L, TENSOR, HAS_ZERO)
    sums_LC = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for c in range(0, g, BLOCK_C):
        at_LC, inside_LC = _tile(line_L, c, total, L, g, BLOCK_C)
        w_LC = tl.load(w_ptr + at_LC, mask=inside_LC, other=0.0).to(tl.float32)
        gradient_LC = tl.load(gradient_ptr + at_LC, mask=inside_LC, other=0.0).to(tl.float32)
        v_LC = tl.div_rn(w_LC, tl.broadcast_to(s_L[:, None], w_LC.shape)) + z_L[:, None]
        if INCLUSIVE:
            on_grid_LC = (v_LC >= low - beyond) & (v_LC <= high + beyond)
        else:
            on_grid_LC = (v_LC > low) & (v_LC < high)
        if OF_W:
            of_w_LC = gradient_LC * on_grid_LC.to(tl.float32)
            tl.store(of_w_ptr + at_LC, of_w_LC.to(of_w_ptr.dtype.element_ty), mask=inside_LC)
        if OF_SCALE:
            c_LC = clamp(v_LC, low, high)
            slope_LC = tl.where(on_grid_LC, round_code(c_LC, FLOAT_BITS) - v_LC, c_LC - z_L[:, None])
            sums_LC += slope_LC * gradient_LC
    if OF_SCALE:
        tl.store(of_lines_ptr + line_L, tl.sum(sums_LC, 1), mask=line_L < L)


@triton.jit
def _grid(s_ptr, z_ptr, line_L, L, TENSOR: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Scales and zero points of lines, in float32."""
    at_L = line_L * 0 if TENSOR else line_L
    s_L = tl.load(s_ptr + at_L, mask=line_L < L, other=1.0).to(tl.float32)
    if HAS_ZERO:
        z_L = tl.load(z_ptr + at_L, mask=line_L < L, other=0).to(tl.float32)
    else:
        z_L = tl.zeros(s_L.shape, tl.float32)
    return s_L, z_L


@triton.jit
def _tile(line_L, c, total, L, g, BLOCK_C: tl.constexpr):
    """Offsets of the numbers of a tile, and which of them are inside the matrix."""
    column_C = c + tl.arange(0, BLOCK_C)
    at_LC = line_L.to(tl.int64)[:, None] * g + column_C[None, :]
    return at_LC, (line_L < L)[:, None] & (column_C < g)[None, :] & (at_LC < total)


@triton.jit
def clamp(v, low, high):
    """NaN stays NaN."""
    return tl.minimum(tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_code(v, FLOAT_BITS: tl.constexpr):
    """The nearest value of the grid, ties to even; |v| < 2^22. Bits of floats 4, 6 or 8 (or True); 0: integers."""
    if FLOAT_BITS:
        power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^e
        if FLOAT_BITS == 4:
            base = tl.maximum(power, 1.0, propagate_nan=tl.PropagateNan.ALL) * 6291456.0  # 2^(e - 1) 1.5 2^23
        elif FLOAT_BITS == 6:
            base = tl.maximum(power, 1.0, propagate_nan=tl.PropagateNan.ALL) * 1572864.0  # 2^(e - 3) 1.5 2^23
        else:
            base = tl.maximum(power, 0.015625, propagate_nan=tl.PropagateNan.ALL) * 1572864.0
    else:
        base = 12582912.0
    return (v + base) - base
