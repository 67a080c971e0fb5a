"""The Triton kernels: tiles of the lower triangle of X^T X from X in 16 bits, added up in float32 registers.

One program computes one tile of H. There are two ways to access memory:

    descriptors    sm_90 and later, X aligned: the tensor memory accelerator loads tiles of X, and adds the sums to a
                   float32 H; to a float64 H, load, add and store
    pointers       all other cases, any stride: tiles of 128 x 128, load, add and store

Sums are added a quarter of the columns at a time: all at once would need more registers, and with the accelerator more
shared memory, than the GPU has.

Tiles that do not fill the processors once more (launch.py) are computed in pieces of the tokens, which a second kernel
adds to H in their order: results are reproducible. A launch has at most 16384 tokens, since tensor cores truncate their
float32 sums.

float32 X becomes a sum of two bf16 numbers, A = bf16(X) and B = bf16(X - A), the rows of B below those of A; then
B^T A + A^T B + A^T A is one sum over three times the tokens, by the same loop. X - A - B is at most 2^-16 of x, of
either sign; B^T B, which is left out, is at most 2^-16 of a sum of squares, and a seventh of that on average. The small
terms are added first, and a launch has at most 2048 tokens.

Shapes: N tokens, C columns; tiles of BLOCK_I rows and BLOCK_J columns of H; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lightning_compress.ops.hessian.launch import HessianLaunch, choose, tiles
from lightning_compress.ops.launches import launching
from lightning_compress.ops.w4a16_gemm.kernel import rounded

__all__ = ["accumulate_", "add_pieces_kernel", "constants", "hessian_kernel", "two_parts", "two_parts_kernel"]

TOKENS = 16384  # tokens of a launch: at C = 14336, 0.8 GB of H are read and written in a twentieth of its time
FLOAT32_TOKENS = 2048  # and of float32: 128 additions of 16 products truncate about 3e-6 of a sum of squares
ROWS = 128  # of the parts of float32 X: a multiple of all block_n


def accumulate_(H_CC: Tensor, X_NC: Tensor, launch: HessianLaunch | None = None) -> Tensor:
    """Add X^T X to the lower triangle of H, float32 or float64, in place; X bf16, fp16 or float32 of any stride."""
    parts = X_NC.dtype == torch.float32
    for X in X_NC.split(FLOAT32_TOKENS if parts else TOKENS):
        if len(X):
            S_NC = two_parts(X) if parts else X
            N = len(S_NC) // 2 * 3 if parts else len(S_NC)
            chosen = launch or choose(N, len(H_CC), X.dtype, X.device, _aligned(S_NC))
            _accumulate_(H_CC, S_NC, N, chosen)
    return H_CC


def two_parts(X_NC: Tensor) -> Tensor:
    """bf16 [2 N', C] of float32 X: the numbers rounded, then what is left of each; N' is N rounded up to ROWS.

    Rows begin at multiples of 16 bytes, so that tensor descriptors are possible.
    """
    N, C = X_NC.shape
    rows = triton.cdiv(N, ROWS) * ROWS
    parts = torch.empty((2 * rows, triton.cdiv(C, 8) * 8), dtype=torch.bfloat16, device=X_NC.device)[:, :C]
    interpreted = not isinstance(two_parts_kernel, triton.JITFunction)
    with launching(X_NC):
        two_parts_kernel[(rows // 16, triton.cdiv(C, 128))](
            X_NC, parts, N, C, rows, X_NC.stride(0), X_NC.stride(1), parts.stride(0), INTERPRETED=interpreted,
            BLOCK_N=16, BLOCK_C=128, num_warps=4,
        )  # fmt: skip
    return parts


def _aligned(X_NC: Tensor) -> bool:
    """Whether a tensor descriptor of X is possible."""
    return X_NC.stride(1) == 1 and X_NC.stride(0) % 8 == 0 and X_NC.data_ptr() % 16 == 0


def _accumulate_(H_CC: Tensor, X_NC: Tensor, N: int, launch: HessianLaunch) -> None:
    """Sums over N tokens: those of X, or, where X holds two parts, three halves of its rows."""
    C, (i, j, n), parts = X_NC.shape[1], (launch.block_i, launch.block_j, launch.block_n), len(X_NC) < N
    count = tiles(C, i, j)
    split_tiles = min(launch.tail, count) if launch.pieces > 1 else 0
    pieces = torch.empty(split_tiles * launch.pieces, i, j, device=H_CC.device, dtype=torch.float32)
    x_i, x_j, h = X_NC, X_NC, H_CC
    if launch.descriptors:
        x_i, x_j = (TensorDescriptor.from_tensor(X_NC, [n, width]) for width in (i, j))
    if reduces := launch.descriptors and H_CC.dtype == torch.float32 and C % 4 == 0 and H_CC.data_ptr() % 16 == 0:
        h = TensorDescriptor.from_tensor(H_CC, [i, j // 4])
    interpreted = not isinstance(hessian_kernel, triton.JITFunction)
    per_piece = triton.cdiv(triton.cdiv(N, n), launch.pieces) * n
    uncut = count - split_tiles
    with launching(H_CC):
        hessian_kernel[(uncut + len(pieces),)](
            x_i, x_j, h, pieces, N, C, X_NC.stride(0), X_NC.stride(1), uncut, launch.pieces, per_piece,
            **constants(launch, reduces, parts, interpreted), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        if split_tiles:
            add_pieces_kernel[(split_tiles, i // 16)](
                H_CC, pieces, C, uncut, launch.pieces, BLOCK_I=i, BLOCK_J=j, ROWS=16, num_warps=4
            )


def constants(
    launch: HessianLaunch, reduces: bool, parts: bool = False, interpreted: bool = False
) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel; ``reduces``: h is a descriptor, too; ``parts``: of float32 X."""
    return {
        "DESCRIPTORS": launch.descriptors,
        "REDUCES": reduces,
        "PIECES": launch.pieces > 1,
        "PARTS": parts,
        "INTERPRETED": interpreted,
        "BLOCK_I": launch.block_i,
        "BLOCK_J": launch.block_j,
        "BLOCK_N": launch.block_n,
    }


@triton.jit
def hessian_kernel(
    x_i, x_j, h, pieces_ptr, N, C, stride_n, stride_c, uncut, pieces, per_piece,
    DESCRIPTORS: tl.constexpr, REDUCES: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x_i and x_j are descriptors of the same X, or its pointer; tiles from ``uncut`` on are computed in pieces.

    PARTS: X holds A, then B, N / 3 rows each; the N tokens are those of B^T A, of A^T B, and of A^T A.
    """
    number = tl.program_id(0)
    start, stop = 0, N
    piece = number - uncut
    if PIECES:
        if piece >= 0:
            number = uncut + piece // pieces
            start = piece % pieces * per_piece
            stop = tl.minimum(start + per_piece, N)
    i, j = _tile(number, BLOCK_J // BLOCK_I)
    row_I = (i * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)  # stride_c is N, and N C beyond 2^31, for X transposed
    column_J = (j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    sums_IJ = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if i * BLOCK_I < C:
        for n in range(start, stop, BLOCK_N):
            n_i, n_j = n, n
            if PARTS:
                n_i, n_j = _of_parts(n, N // 3)
            if DESCRIPTORS:
                a_NI = x_i.load([n_i, i * BLOCK_I])
                b_NJ = x_j.load([n_j, j * BLOCK_J])
            else:
                token_N = tl.arange(0, BLOCK_N)
                tokens = (n + token_N < stop)[:, None]
                rows, columns = tokens & (row_I < C)[None, :], tokens & (column_J < C)[None, :]
                at_i, at_j = (n_i + token_N).to(tl.int64)[:, None], (n_j + token_N).to(tl.int64)[:, None]
                a_NI = tl.load(x_i + at_i * stride_n + row_I[None, :] * stride_c, mask=rows, other=0.0)
                b_NJ = tl.load(x_j + at_j * stride_n + column_J[None, :] * stride_c, mask=columns, other=0.0)
            if INTERPRETED:  # NumPy has no bf16
                a_NI, b_NJ = a_NI.to(tl.float32), b_NJ.to(tl.float32)
            sums_IJ = tl.dot(tl.trans(a_NI), b_NJ, sums_IJ)
    if PIECES:
        if piece >= 0:
            at_IJ = tl.arange(0, BLOCK_I)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
            tl.store(pieces_ptr + piece.to(tl.int64) * BLOCK_I * BLOCK_J + at_IJ, sums_IJ)
        else:
            _add(h, C, i, j, sums_IJ, REDUCES, INTERPRETED)
    else:
        _add(h, C, i, j, sums_IJ, REDUCES, INTERPRETED)


@triton.jit
def _of_parts(n, count):
    """Rows of both factors in [A, B], ``count`` rows each: B and A, then A and B, then A and A."""
    n_i = tl.where(n < count, n + count, tl.where(n < 2 * count, n - count, n - 2 * count))
    return n_i, tl.where(n < 2 * count, n, n - 2 * count)


@triton.jit
def two_parts_kernel(
    x_ptr, parts_ptr, N, C, rows, stride_n, stride_c, stride_out,
    INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A and B of a tile of float32 X, 0 for the rows from N on."""
    row_N1 = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    column_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (row_N1 < N) & (column_1C < C)
    x_NC = tl.load(x_ptr + row_N1 * stride_n + column_1C * stride_c, mask=inside, other=0.0)
    a_NC = rounded(x_NC, tl.bfloat16, INTERPRETED)
    b_NC = rounded(x_NC - a_NC.to(tl.float32), tl.bfloat16, INTERPRETED)
    out_ptr = parts_ptr + row_N1 * stride_out + column_1C
    tl.store(out_ptr, a_NC, mask=column_1C < C)
    tl.store(out_ptr + tl.cast(rows, tl.int64) * stride_out, b_NC, mask=column_1C < C)


@triton.jit
def add_pieces_kernel(
    h, pieces_ptr, C, uncut, pieces, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ROWS: tl.constexpr
):
    """Add the pieces of a tile to H, in their order."""
    i, j = _tile(uncut + tl.program_id(0), BLOCK_J // BLOCK_I)
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at_RJ = row_R[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    pieces_ptr += tl.program_id(0).to(tl.int64) * pieces * BLOCK_I * BLOCK_J
    sums_RJ = tl.zeros((ROWS, BLOCK_J), tl.float32)
    for _ in range(pieces):
        sums_RJ += tl.load(pieces_ptr + at_RJ)
        pieces_ptr += BLOCK_I * BLOCK_J
    _add_by_pointers(h, C, i * BLOCK_I + row_R, j * BLOCK_J + tl.arange(0, BLOCK_J), sums_RJ)


@triton.jit
def _add(h, C, i, j, sums_IJ, REDUCES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add a tile to H, a quarter of the columns at a time."""
    ROWS: tl.constexpr = sums_IJ.shape[0]
    QUARTER: tl.constexpr = sums_IJ.shape[1] // 4
    left, right = _halves(sums_IJ)
    first, second = _halves(left)
    third, fourth = _halves(right)
    row, column = i * ROWS, j * 4 * QUARTER
    if REDUCES:
        _reduce(h, row, column, first, INTERPRETED)
        _reduce(h, row, column + QUARTER, second, INTERPRETED)
        _reduce(h, row, column + 2 * QUARTER, third, INTERPRETED)
        _reduce(h, row, column + 3 * QUARTER, fourth, INTERPRETED)
    else:
        _add_halves(h, C, row, column, first)
        _add_halves(h, C, row, column + QUARTER, second)
        _add_halves(h, C, row, column + 2 * QUARTER, third)
        _add_halves(h, C, row, column + 3 * QUARTER, fourth)


@triton.jit
def _add_halves(h, C, row, column, sums_IJ):
    """Two additions: a float64 quarter of 64 columns at once spills registers."""
    HALF: tl.constexpr = sums_IJ.shape[1] // 2
    row_I, column_J = row + tl.arange(0, sums_IJ.shape[0]), column + tl.arange(0, HALF)
    left, right = _halves(sums_IJ)
    _add_by_pointers(h, C, row_I, column_J, left)
    _add_by_pointers(h, C, row_I, column_J + HALF, right)


@triton.jit
def _add_by_pointers(h, C, row_I, column_J, sums_IJ):
    """Add sums to H in its dtype."""
    inside = (row_I < C)[:, None] & (column_J < C)[None, :]
    at_IJ = h + row_I.to(tl.int64)[:, None] * C + column_J[None, :]
    tl.store(at_IJ, tl.load(at_IJ, mask=inside, other=0.0) + sums_IJ, mask=inside)


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
