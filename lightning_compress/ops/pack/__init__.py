"""Integer codes of 1 to 8 bits packed densely into 32-bit words, as compressed-tensors stores them; exact inverses.

On CUDA a Triton kernel reads and writes once; elsewhere torch packs in lanes of 64 bits (lanes.py). README beside this
file.

Shapes: C codes along the dimension that is packed, P = ceil(C bits / 32) words.
"""

import torch
from torch import Tensor

from lightning_compress.ops.availability import calls_kernel, kernel_runs
from lightning_compress.ops.pack.lanes import pack_rows, unpack_rows
from lightning_compress.ops.registration import register_op

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Words int32, contiguous, in the shape of ``codes`` with P in place of C.

    Args:
        codes: int8, from -2^(bits - 1) to 2^(bits - 1) - 1; of other values only the lowest ``bits`` bits are used.
        bits: Bits of a code, 1 to 8. 32 codes fill ``bits`` words, the first in the lowest bits; codes of 3, 5, 6 and
            7 bits may extend over two words.
        dim: Dimension along which codes are packed. Unused bits of the last word are zero.

    Raises:
        ValueError: Wrong dtype, number of bits or dimension.
    """
    _check(codes, torch.int8, bits, dim)
    words: Tensor = (_pack_op if _needs_op(codes) else _pack)(codes.movedim(dim, -1), bits)
    return words.movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """Codes int8, contiguous, in the shape of ``words`` with C = ``size`` in place of P.

    Args:
        words: int32, from :func:`pack`.
        bits: Number of bits of a code, 1 to 8, as for :func:`pack`.
        size: Number of codes C.
        dim: Dimension along which codes were packed.

    Raises:
        ValueError: Wrong dtype, number of bits or dimension, or P words do not hold C codes.
    """
    _check(words, torch.int32, bits, dim)
    P = words.shape[dim]
    if size < 0 or -(-size * bits // 32) != P:
        raise ValueError(
            f"{size} codes of {bits} bits need {-(-size * bits // 32)} words, got {P} along dimension {dim}: "
            f"{tuple(words.shape)}; pass the size and the bits that were packed"
        )
    codes: Tensor = (_unpack_op if _needs_op(words) else _unpack)(words.movedim(dim, -1), bits, size)
    return codes.movedim(-1, dim).contiguous()


def _check(t: Tensor, dtype: torch.dtype, bits: int, dim: int) -> None:
    if t.dtype != dtype:
        raise ValueError(f"expected {dtype}, got {t.dtype}; codes are int8, words are int32")
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, got {bits}")
    if not -t.ndim <= dim < t.ndim:
        raise ValueError(f"dimension {dim} is out of range for a tensor of shape {tuple(t.shape)}")


def _needs_op(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or (t.is_cuda and not calls_kernel(t))


def _pack(codes: Tensor, bits: int) -> Tensor:
    C = codes.shape[-1]
    shape = (*codes.shape[:-1], -(-C * bits // 32))
    if not codes.numel():
        return codes.new_zeros(shape, dtype=torch.int32)
    codes_RC = codes.reshape(-1, C)
    if codes.is_cuda and _kernel_runs(codes.device):
        from lightning_compress.ops.pack import kernel

        return kernel.pack(codes_RC, bits).view(shape)
    return pack_rows(codes_RC, bits).view(shape)


def _unpack(words: Tensor, bits: int, size: int) -> Tensor:
    shape = (*words.shape[:-1], size)
    if not words.numel():
        return words.new_zeros(shape, dtype=torch.int8)
    words_RP = words.reshape(-1, words.shape[-1])
    if words.is_cuda and _kernel_runs(words.device):
        from lightning_compress.ops.pack import kernel

        return kernel.unpack(words_RP, bits, size).view(shape)
    return unpack_rows(words_RP, bits, size).view(shape)


def _kernel_runs(device: torch.device) -> bool:
    return kernel_runs(device, "codes are packed and unpacked by a dozen kernels of torch")


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] * bits + 31) // 32), dtype=torch.int32)


def _unpack_fake(words: Tensor, bits: int, size: int) -> Tensor:
    return words.new_empty((*words.shape[:-1], size), dtype=torch.int8)


_pack_op = register_op("pack", "(Tensor codes, SymInt bits) -> Tensor", _pack, _pack_fake)
_unpack_op = register_op("unpack", "(Tensor words, SymInt bits, SymInt size) -> Tensor", _unpack, _unpack_fake)
