"""int8 products on the CPU, by oneDNN: y = s_m (sum_k q_mk w_nk - z_m sum_k w_nk) s_n, the sums exact.

Two ways, both of torch: ``_int_mm`` on the weight as it is, and ``qlinear`` on a weight that was laid out once
(unsigned codes, q + 128; with signed ones it takes a loop that is a thousand times slower). On CPUs without VNNI
instructions both add pairs of products up in 16 bits and saturate, so :func:`is_exact` must be asked first.

Shapes: M tokens, N output features, K input features.
"""

import torch
from torch import Tensor

__all__ = ["gemm", "is_exact", "prepare"]

SMALL = 2**19  # weights up to which laying out anew is quicker than qlinear's 30 us (bench_packed_cpu.py)
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.compiler.assume_constant_result
def is_exact() -> bool:
    """Whether this process makes exact sums of the largest codes: VNNI is there, and oneDNN uses it."""
    if not torch.cpu._is_vnni_supported():
        return False
    codes_MK = torch.full((32, 64), 127, dtype=torch.int8)
    codes_MK[::2] = -128
    weight_NK = codes_MK[:2]
    sums_MN = (codes_MK.double() @ weight_NK.double().t()).float()
    ones_N = torch.ones(2, dtype=torch.float32)
    packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
    zero_N = torch.zeros(2, dtype=torch.int32)
    ways = [_laid_out(codes_MK, packed, ones_N, zero_N), torch._int_mm(codes_MK, weight_NK.t()).float()]
    return all(torch.equal(found, sums_MN) for found in ways)


def prepare(weight_NK: Tensor, scale_N: Tensor) -> Operands:
    """The weight, int8 and contiguous, as it is and laid out for qlinear; scales, zeros and sums of codes, [N]."""
    if torch.compiler.is_compiling():  # qlinear_prepack cannot be traced
        packed = weight_NK
    else:
        packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
    scale_N = scale_N.float().contiguous()
    zero_N = torch.zeros(len(weight_NK), dtype=torch.int32)
    return weight_NK, packed, scale_N, zero_N, weight_NK.sum(1, dtype=torch.int32) * scale_N


def gemm(codes_MK: Tensor, scale: Tensor, zero: Tensor | None, operands: Operands) -> Tensor:
    """The product [M, N], float32.

    Args:
        codes_MK: int8, contiguous.
        scale: Of the tokens, float32 [M, 1] or [1].
        zero: Their zero points, as scale; None for symmetric codes.
        operands: From :func:`prepare`.
    """
    weight_NK, packed, scale_N, zero_N, sums_N = operands
    if len(codes_MK) == 1 or weight_NK.numel() <= SMALL or torch.compiler.is_compiling():
        y_MN = torch._int_mm(codes_MK, weight_NK.t()) * scale_N
    else:
        y_MN = _laid_out(codes_MK, packed, scale_N, zero_N)
    if zero is not None:
        y_MN = y_MN - zero * sums_N
    return y_MN.mul_(scale)


def _laid_out(codes_MK: Tensor, packed: Tensor, scale_N: Tensor, zero_N: Tensor) -> Tensor:
    """The sums times the weight's scale, float32 [M, N]; ``packed`` must be laid out, or the process dies."""
    unsigned_MK = codes_MK.view(torch.uint8) ^ 128
    y_MN: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned_MK, 1.0, 128, packed, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y_MN
