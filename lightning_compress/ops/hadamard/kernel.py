"""The Triton kernel: n = m 2^k features of a row in registers, read and written once.

The power of two is split into digits of 16 to 128, S_4096 = S_16 (x) S_16 (x) S_16, and each digit is one product in
the tensor cores with a matrix of +-1, which is computed from its indices. After each product the tile is transposed so
that the next digit is the last dimension; after all of them the order is the original one. The base is one more
product, the first.

Products with +-1 are exact, and sums are in float32. 16-bit x enters the first product unchanged; other operands are
split into sums of bf16 numbers: two, which hold 16 bits, or three for float32 x.

For a base of more than 64, and tiles of more than 16384 numbers (4096 with a base before sm_90, where larger tiles
spill), a matrix product follows the kernel.

Shapes: A rows of a tile (of x; with a base, its padded order), P features of a row of a tile; Triton 3.6 to 3.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.hadamard.reference import sylvester
from lightning_compress.ops.launches import launching

__all__ = ["constants", "hadamard_kernel", "transform", "warps"]

TILE = 16384  # numbers that 8 to 16 warps hold in registers, in float32
LARGEST_BASE = 64


def transform(x: Tensor, base_mm: Tensor | None, scale: float) -> Tensor:
    """y [..., n] in the dtype of x, float16, bfloat16 or float32; n / m is at least 16."""
    x_Rn, m = x.reshape(-1, x.shape[-1]), 1 if base_mm is None else len(base_mm)
    P = x_Rn.shape[1] // m
    if m == 1 or _fits(m, P, x.device):
        base_mm = base_mm if m > 1 else None
        return _tiles(x_Rn, base_mm, m, P, scale).view(x.shape)
    inner = min(P, TILE)
    y_Rmp = _tiles(x_Rn.reshape(-1, inner), None, 1, inner, scale).view(len(x_Rn), -1, inner)
    assert base_mm is not None
    outer = torch.kron(base_mm.to(x), sylvester(P // inner).to(x))
    return torch.matmul(outer.t(), y_Rmp).view(x.shape)


def _fits(m: int, P: int, device: torch.device) -> bool:
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return m <= LARGEST_BASE and max(16, triton.next_power_of_2(m)) * P <= (TILE // 4 if old else TILE)


def _tiles(x_Rn: Tensor, base_mm: Tensor | None, m: int, P: int, scale: float) -> Tensor:
    if P > TILE:  # S_P = S_outer (x) S_TILE
        y_RoT = _tiles(x_Rn.reshape(-1, TILE), None, 1, TILE, scale).view(len(x_Rn), -1, TILE)
        return torch.matmul(sylvester(P // TILE).to(x_Rn), y_RoT).view(x_Rn.shape)
    x_Rn = x_Rn.contiguous()
    out = torch.empty_like(x_Rn)
    interpreted = not isinstance(hadamard_kernel, triton.JITFunction)
    fixed = constants(m, P, x_Rn.dtype, interpreted)
    rows = 1 if m > 1 else fixed["A"]
    with launching(x_Rn):
        hadamard_kernel[(triton.cdiv(len(x_Rn), rows),)](
            x_Rn, None if base_mm is None else base_mm.to(x_Rn.dtype).contiguous(), out, len(x_Rn), float(scale),
            **fixed, num_warps=warps(m, P),
        )  # fmt: skip
    return out


def constants(m: int, P: int, dtype: torch.dtype, interpreted: bool = False) -> dict[str, int]:
    """The compile-time arguments of the kernel: tile, digits (1: none), bf16 numbers that an operand is split into."""
    digits: list[int] = []
    rest = P
    while rest > 128:
        digits.append(16 if rest >= 4096 or rest < 512 else 32)
        rest //= digits[-1]
    first, second, third = [rest, *digits[::-1], 1, 1][:3]
    assert first * second * third == P
    parts = 1 if interpreted else 3 if dtype == torch.float32 else 2
    return {
        "M": m,
        "A": max(1, 4096 // P, 16 * first // P) if m == 1 else max(16, triton.next_power_of_2(m)),
        "P": P,
        "FIRST": first,
        "SECOND": second,
        "THIRD": third,
        "PARTS": parts,
        "INTERPRETED": int(interpreted),
    }


def warps(m: int, P: int) -> int:
    """Warps of a program; with fewer, registers spill (measured by compiling)."""
    if m > 1 or P == 128:
        return 8
    return 4 if P <= 4096 else 8 if P <= 8192 else 16


@triton.jit
def hadamard_kernel(
    x_ptr, base_ptr, out_ptr, R, scale,
    M: tl.constexpr, A: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    a_A = tl.arange(0, A)
    if M > 1:
        at_A = tl.program_id(0).to(tl.int64) * M + a_A
        rows_A = a_A < M
    else:
        at_A = tl.program_id(0).to(tl.int64) * A + a_A
        rows_A = at_A < R
    at_AP = at_A[:, None] * P + tl.arange(0, P)[None, :]
    y_AP = tl.load(x_ptr + at_AP, mask=rows_A[:, None], other=0.0)
    EXACT: tl.constexpr = 3 if PARTS == 3 else 1  # 16-bit x is not split
    if M > 1:
        at_AA = a_A[None, :] * M + a_A[:, None]  # B^T
        base_AA = tl.load(base_ptr + at_AA, mask=rows_A[None, :] & rows_A[:, None], other=0.0)
        y_AP = _product(base_AA, y_AP, EXACT, True, INTERPRETED)
        y_AP = _digit(y_AP, A, P, FIRST, PARTS, INTERPRETED)
    else:
        y_AP = _digit(y_AP, A, P, FIRST, EXACT, INTERPRETED)
    if SECOND > 1:
        y_AP = _digit(y_AP, A, P, SECOND, PARTS, INTERPRETED)
    if THIRD > 1:
        y_AP = _digit(y_AP, A, P, THIRD, PARTS, INTERPRETED)
    tl.store(out_ptr + at_AP, (y_AP * scale).to(out_ptr.dtype.element_ty), mask=rows_A[:, None])


@triton.jit
def _digit(y_AP, A: tl.constexpr, P: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Transform the last digit, and make it the first."""
    i_F = tl.arange(0, F)
    parity_FF = i_F[:, None] & i_F[None, :]
    parity_FF = parity_FF ^ (parity_FF >> 4)
    parity_FF = parity_FF ^ (parity_FF >> 2)
    parity_FF = parity_FF ^ (parity_FF >> 1)
    S_FF = (1 - 2 * (parity_FF & 1)).to(tl.float32)
    y_QF = _product(tl.reshape(y_AP, (A * (P // F), F)), S_FF, PARTS, False, INTERPRETED)
    if P == F:
        y_AP = y_QF
    else:
        y_AP = tl.reshape(tl.permute(tl.reshape(y_QF, (A, P // F, F)), (0, 2, 1)), (A, P))
    return y_AP


@triton.jit
def _product(a, b, PARTS: tl.constexpr, SIGNS_FIRST: tl.constexpr, INTERPRETED: tl.constexpr):
    """The product of numbers and signs, float32; SIGNS_FIRST: a holds the signs."""
    if INTERPRETED:  # NumPy has no bf16
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PARTS == 1:
        if SIGNS_FIRST:
            sums = tl.dot(a.to(b.dtype), b)
        else:
            sums = tl.dot(a, b.to(a.dtype))
    else:
        rest = b.to(tl.float32) if SIGNS_FIRST else a.to(tl.float32)
        signs = a.to(tl.bfloat16) if SIGNS_FIRST else b.to(tl.bfloat16)
        sums = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
        for _ in tl.static_range(PARTS):
            high = rest.to(tl.bfloat16)
            if SIGNS_FIRST:
                sums = tl.dot(signs, high, sums)
            else:
                sums = tl.dot(high, signs, sums)
            rest -= high.to(tl.float32)
    return sums
