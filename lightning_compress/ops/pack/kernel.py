"""The Triton kernels: groups of 32 codes, which fill as many words as a code has bits, read and written once.

A thread joins four neighbouring codes to a quad of 4 b bits; the eight quads of a group are then separated, shifted to
the positions of their bits in each word, and joined again. Unpacking is the reverse. Which bits of a word belong to
which quad is known when the kernel is compiled.

Shapes: R rows of C codes or P words, in G = ceil(C / 32) groups; runs under Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.launches import launching

__all__ = ["GROUPS", "WARPS", "launch", "pack", "pack_kernel", "pack_quads", "unpack", "unpack_kernel"]

GROUPS = 128  # groups in a program: one or two 16-byte loads of codes to a thread
WARPS = 4


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Words int32 [R, P]."""
    codes_RC = codes_RC.contiguous()
    R, C = codes_RC.shape
    P = triton.cdiv(C * bits, 32)
    words_RP = torch.empty((R, P), dtype=torch.int32, device=codes_RC.device)
    grid, fixed, sizes = launch(R, C, P, bits)
    with launching(codes_RC):
        pack_kernel[grid](codes_RC, words_RP, *sizes, **fixed, num_warps=WARPS)
    return words_RP


def unpack(words_RP: Tensor, bits: int, C: int) -> Tensor:
    """Codes int8 [R, C]."""
    words_RP = words_RP.contiguous()
    R, P = words_RP.shape
    codes_RC = torch.empty((R, C), dtype=torch.int8, device=words_RP.device)
    grid, fixed, sizes = launch(R, C, P, bits)
    with launching(words_RP):
        unpack_kernel[grid](words_RP, codes_RC, *sizes, **fixed, num_warps=WARPS)
    return codes_RC


def launch(R: int, C: int, P: int, bits: int) -> tuple[tuple[int], dict[str, int | bool], tuple[int, int, int]]:
    """Grid, compile-time arguments and sizes. Rows of complete groups are treated as one row, with WHOLE."""
    complete = C % 32 == 0
    R, C, P = (1, R * C, R * P) if complete else (R, C, P)
    G = triton.cdiv(C, 32)
    block = GROUPS if complete else min(GROUPS, max(16, triton.next_power_of_2(G)))
    fixed = {"BITS": bits, "WORDS": triton.next_power_of_2(bits), "WHOLE": complete, "BLOCK": block}
    return (R * triton.cdiv(G, block),), fixed, (C, P, G)


@triton.jit
def pack_kernel(
    codes_ptr, words_ptr, C, P, G,
    BITS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group_B = _groups(G, BLOCK)
    at_Bc, codes_Bc = _codes(row, group_B, C, G, WHOLE)
    u_Bc = tl.load(codes_ptr + at_Bc, mask=codes_Bc, other=0).to(tl.int32) + (1 << (BITS - 1)) & (1 << BITS) - 1
    if not WHOLE:
        u_Bc = tl.where(codes_Bc, u_Bc, 0)
    at_Bw, words_Bw = _words(row, group_B, P, G, BITS, WORDS, WHOLE)
    tl.store(words_ptr + at_Bw, pack_quads(u_Bc, BITS, WORDS, BLOCK), mask=words_Bw)


@triton.jit
def unpack_kernel(
    words_ptr, codes_ptr, C, P, G,
    BITS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group_B = _groups(G, BLOCK)
    at_Bw, words_Bw = _words(row, group_B, P, G, BITS, WORDS, WHOLE)
    words = _apart(tl.load(words_ptr + at_Bw, mask=words_Bw, other=0).to(tl.uint32, bitcast=True), WORDS, BLOCK)
    q0 = _quad(words, 0, BITS, WORDS)
    q1 = _quad(words, 1, BITS, WORDS)
    q2 = _quad(words, 2, BITS, WORDS)
    q3 = _quad(words, 3, BITS, WORDS)
    q4 = _quad(words, 4, BITS, WORDS)
    q5 = _quad(words, 5, BITS, WORDS)
    q6 = _quad(words, 6, BITS, WORDS)
    q7 = _quad(words, 7, BITS, WORDS)
    evens = tl.join(tl.join(q0, q4), tl.join(q2, q6))
    odds = tl.join(tl.join(q1, q5), tl.join(q3, q7))
    quad_Bq = tl.reshape(tl.join(evens, odds), (BLOCK, 8))
    shift_j = (tl.arange(0, 4) * BITS).to(tl.uint32)
    u_Bqj = (quad_Bq[:, :, None] >> shift_j[None, None, :]) & (1 << BITS) - 1
    codes = tl.reshape(u_Bqj.to(tl.int32) - (1 << (BITS - 1)), (BLOCK, 32)).to(tl.int8)
    at_Bc, codes_Bc = _codes(row, group_B, C, G, WHOLE)
    tl.store(codes_ptr + at_Bc, codes, mask=codes_Bc)


@triton.jit
def pack_quads(u_Bc, BITS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words int32 [BLOCK, WORDS] of 32 numbers 0 to 2^BITS - 1, int32; words from BITS on are zero."""
    u_Bqj = tl.reshape(u_Bc, (BLOCK, 8, 4)).to(tl.uint32, bitcast=True)
    shift_j = (tl.arange(0, 4) * BITS).to(tl.uint32)
    quads = _apart(tl.sum(u_Bqj << shift_j[None, None, :], 2), 8, BLOCK)
    w0 = _word(quads, 0, BITS)
    if WORDS == 1:
        words_Bw = tl.reshape(w0, (BLOCK, 1))
    elif WORDS == 2:
        words_Bw = tl.join(w0, _word(quads, 1, BITS))
    else:
        evens, odds = tl.join(w0, _word(quads, 2, BITS)), tl.join(_word(quads, 1, BITS), _word(quads, 3, BITS))
        if WORDS == 8:
            evens = tl.join(tl.join(w0, _word(quads, 4, BITS)), tl.join(_word(quads, 2, BITS), _word(quads, 6, BITS)))
            odds = tl.join(
                tl.join(_word(quads, 1, BITS), _word(quads, 5, BITS)),
                tl.join(_word(quads, 3, BITS), _word(quads, 7, BITS)),
            )
        words_Bw = tl.reshape(tl.join(evens, odds), (BLOCK, WORDS))
    return words_Bw.to(tl.int32, bitcast=True)


@triton.jit
def _word(quads, W: tl.constexpr, BITS: tl.constexpr):
    """Word W of a group, from the quads that have bits in it."""
    word = tl.zeros_like(quads[0])
    for k in tl.static_range(8):
        if BITS * k // 8 == W:  # the first bits of the quad
            word |= quads[k] << 4 * BITS * k % 32
        elif (BITS * k + BITS - 1) // 8 == W:  # its other bits
            word |= quads[k] >> 32 - 4 * BITS * k % 32
    return word


@triton.jit
def _quad(words, K: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Quad K of a group: 4 BITS bits, from one word or from two."""
    quad = words[4 * BITS * K // 32] >> 4 * BITS * K % 32
    if 4 * BITS * K % 32 + 4 * BITS > 32:
        quad |= words[4 * BITS * K // 32 + 1] << 32 - 4 * BITS * K % 32
    return quad


@triton.jit
def _apart(x_BN, N: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a tile, N = 1, 2, 4 or 8."""
    if N == 1:
        columns = (tl.reshape(x_BN, (BLOCK,)),)
    elif N == 2:
        columns = tl.split(x_BN)
    else:
        evens, odds = tl.split(tl.reshape(x_BN, (BLOCK, N // 2, 2)))
        if N == 4:
            x0, x2 = tl.split(evens)
            x1, x3 = tl.split(odds)
            columns = (x0, x1, x2, x3)  # type: ignore[assignment]
        else:
            x04, x26 = tl.split(tl.reshape(evens, (BLOCK, 2, 2)))
            x15, x37 = tl.split(tl.reshape(odds, (BLOCK, 2, 2)))
            x0, x4 = tl.split(x04)
            x2, x6 = tl.split(x26)
            x1, x5 = tl.split(x15)
            x3, x7 = tl.split(x37)
            columns = (x0, x1, x2, x3, x4, x5, x6, x7)  # type: ignore[assignment]
    return columns


@triton.jit
def _groups(G, BLOCK: tl.constexpr):
    """The row of a program, and its groups."""
    blocks = tl.cdiv(G, BLOCK)
    number = tl.program_id(0)
    return (number // blocks).to(tl.int64), (number % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _codes(row, group_B, C, G, WHOLE: tl.constexpr):
    """Offsets of the codes of groups, and which of them are inside the row."""
    column_Bc = group_B[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside_Bc = (group_B < G)[:, None] if WHOLE else column_Bc < C
    return row * C + column_Bc, inside_Bc


@triton.jit
def _words(row, group_B, P, G, BITS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr):
    """The same for words; the last WORDS - BITS columns are unused."""
    column_w = tl.arange(0, WORDS)
    column_Bw = group_B[:, None] * BITS + column_w[None, :]
    inside_Bw = (group_B < G)[:, None] if WHOLE else column_Bw < P
    return row * P + column_Bw, inside_Bw & (column_w < BITS)[None, :]
