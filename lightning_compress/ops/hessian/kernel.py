"""The Triton kernel: tiles of the lower triangle of X^T X from 16-bit X, added up in float32 registers.

One program computes one tile of H from all tokens of its share. There are two ways to access memory:

    descriptors    sm_90 and later, X aligned: the tensor memory accelerator loads tiles of X and adds the sums to H, a
                   quarter of the columns at a time (all at once would need more shared memory than the GPU has; load,
                   add and store of 128 x 256 sums spill registers)
    pointers       all other cases, any stride: tiles of 128 x 128, load, add and store

With fewer tiles than processors the tokens are split, and the sums of the splits are added in a fixed order: results
are reproducible. A launch has at most 16384 tokens, since tensor cores truncate their float32 sums.

Shapes: N tokens, C columns; tiles of BLOCK_I rows and BLOCK_J columns of H; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lightning_compress.ops.hessian.launch import HessianLaunch, choose, tiles
from lightning_compress.ops.launches import launching

__all__ = ["accumulate_", "constants", "hessian_kernel"]

TOKENS = 16384  # tokens of a launch: at C = 14336, 0.8 GB of H are read and written in a twentieth of its time


def accumulate_(H_CC: Tensor, X_NC: Tensor, launch: HessianLaunch | None = None) -> Tensor:
    """Add X^T X to the lower triangle of H, float32 or float64, in place; X bf16 or fp16 of any stride."""
    for X in X_NC.split(TOKENS):
        if len(X):
            _accumulate_(H_CC, X, launch or choose(len(X), len(H_CC), X.dtype, X.device, _aligned(H_CC, X)))
    return H_CC


def _aligned(H_CC: Tensor, X_NC: Tensor) -> bool:
    """Whether tensor descriptors of both tensors are possible; they add float32 only."""
    return (
        X_NC.stride(1) == 1 and X_NC.stride(0) % 8 == 0 and X_NC.data_ptr() % 16 == 0
        and H_CC.dtype == torch.float32 and H_CC.stride(0) % 4 == 0 and H_CC.data_ptr() % 16 == 0
    )  # fmt: skip


def _accumulate_(H_CC: Tensor, X_NC: Tensor, launch: HessianLaunch) -> None:
    N, C = X_NC.shape
    split = launch.split
    out = H_CC if split == 1 else torch.zeros(split, C, C, device=H_CC.device, dtype=torch.float32)
    interpreted = not isinstance(hessian_kernel, triton.JITFunction)
    x, h = X_NC, out
    if launch.descriptors:
        assert split == 1, "sums of splits are added by pointers"
        x_i = TensorDescriptor.from_tensor(X_NC, [launch.block_n, launch.block_i])
        x_j = TensorDescriptor.from_tensor(X_NC, [launch.block_n, launch.block_j])
        h = TensorDescriptor.from_tensor(out, [launch.block_i, launch.block_j // 4])
    else:
        x_i = x_j = x
    per_split = triton.cdiv(triton.cdiv(N, launch.block_n), split) * launch.block_n
    with launching(H_CC):
        hessian_kernel[(tiles(C, launch.block_i, launch.block_j), split)](
            x_i, x_j, h, N, C, X_NC.stride(0), X_NC.stride(1), per_split, **constants(launch, interpreted),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    if split > 1:
        H_CC += out.sum(0)


def constants(launch: HessianLaunch, interpreted: bool = False) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "ADD": launch.split == 1,
        "DESCRIPTORS": launch.descriptors,
        "INTERPRETED": interpreted,
        "BLOCK_I": launch.block_i,
        "BLOCK_J": launch.block_j,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def hessian_kernel(
    x_i, x_j, h, N, C, stride_n, stride_c, per_split,
    ADD: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x_i and x_j are descriptors of the same X, or its pointer; ADD: add to h, not into the sums of a split."""
    i, j = _tile(tl.program_id(0), BLOCK_J // BLOCK_I)
    if i * BLOCK_I < C:
        start = tl.program_id(1) * per_split
        stop = tl.minimum(start + per_split, N)
        row_I = i * BLOCK_I + tl.arange(0, BLOCK_I)
        column_J = j * BLOCK_J + tl.arange(0, BLOCK_J)
        sums_IJ = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for n in range(start, stop, BLOCK_N):
            if DESCRIPTORS:
                a_NI = x_i.load([n, i * BLOCK_I])
                b_NJ = x_j.load([n, j * BLOCK_J])
            else:
                token_N = n + tl.arange(0, BLOCK_N)
                tokens, at_N = (token_N < stop)[:, None], token_N.to(tl.int64)[:, None] * stride_n
                rows, columns = tokens & (row_I < C)[None, :], tokens & (column_J < C)[None, :]
                a_NI = tl.load(x_i + at_N + row_I[None, :] * stride_c, mask=rows, other=0.0)
                b_NJ = tl.load(x_j + at_N + column_J[None, :] * stride_c, mask=columns, other=0.0)
            if INTERPRETED:  # NumPy has no bf16
                a_NI, b_NJ = a_NI.to(tl.float32), b_NJ.to(tl.float32)
            sums_IJ = tl.dot(tl.trans(a_NI), b_NJ, sums_IJ)
        if DESCRIPTORS:
            QUARTER: tl.constexpr = BLOCK_J // 4
            left, right = _halves(sums_IJ)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _reduce(h, i * BLOCK_I, j * BLOCK_J, first, INTERPRETED)
            _reduce(h, i * BLOCK_I, j * BLOCK_J + QUARTER, second, INTERPRETED)
            _reduce(h, i * BLOCK_I, j * BLOCK_J + 2 * QUARTER, third, INTERPRETED)
            _reduce(h, i * BLOCK_I, j * BLOCK_J + 3 * QUARTER, fourth, INTERPRETED)
        else:
            inside = (row_I < C)[:, None] & (column_J < C)[None, :]
            at_IJ = h + (tl.program_id(1).to(tl.int64) * C + row_I[:, None]) * C + column_J[None, :]
            if ADD:  # in the dtype of h
                tl.store(at_IJ, tl.load(at_IJ, mask=inside, other=0.0) + sums_IJ, mask=inside)
            else:
                tl.store(at_IJ, sums_IJ, mask=inside)


@triton.jit
def _tile(number, RATIO: tl.constexpr):
    """Row and column of a tile: RATIO rows of tiles in turn have 1, 2, 3 ... tiles that reach the triangle."""
    p = ((tl.sqrt(8.0 * (number // RATIO).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    p = tl.where(RATIO * ((p + 1) * (p + 2) // 2) <= number, p + 1, p)  # the root is rounded
    p = tl.where(RATIO * (p * (p + 1) // 2) > number, p - 1, p)
    rest = number - RATIO * (p * (p + 1) // 2)
    return RATIO * p + rest // (p + 1), rest % (p + 1)


@triton.jit
def _halves(sums_IJ):
    """The left and the right half of the columns."""
    ROWS: tl.constexpr = sums_IJ.shape[0]
    HALF: tl.constexpr = sums_IJ.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(sums_IJ, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _reduce(h, row, column, sums_IJ, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter has no reduce-add
        h.store([row, column], h.load([row, column]) + sums_IJ)
    else:
        h.atomic_add([row, column], sums_IJ)
