"""Codes into words, and back; beside torch and compressed-tensors."""

import importlib
from types import ModuleType

import torch

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.pack import pack, reference, unpack

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 70)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(R: int, C: int, bits: int, back: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
            codes = torch.randint(low, high, (R, C), generator=random, device=device, dtype=torch.int8)
            if not back:
                theirs = {
                    "torch, step by step": lambda: reference.pack(codes, bits),
                    "compressed-tensors": lambda: peer().pack_to_int32(codes, bits),
                }
                return Trial(lambda: pack(codes, bits), theirs, lambda: reference.pack(codes, bits))
            words = reference.pack(codes, bits)
            theirs = {
                "torch, step by step": lambda: reference.unpack(words, bits, C),
                "compressed-tensors": lambda: peer().unpack_from_int32(words, bits, codes.shape),
            }
            return Trial(lambda: unpack(words, bits, C), theirs, lambda: codes)

        moved = R * C + 4 * R * -(-C * bits // 32)
        return Case("pack", f"{R} x {C}, {bits} bits, {'unpack' if back else 'pack'}", moved, 0, 1e-9, make)

    return [case(R, C, bits, back) for bits in (4, 3, 8) for back in (False, True) for R, C in shapes]


def peer() -> ModuleType:
    """compressed-tensors' packing; what it raises where it is missing is reported."""
    return importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
