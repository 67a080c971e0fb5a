"""int8 products on the CPU, by oneDNN: y = s_m (sum_k q_mk w_nk - z_m sum_k w_nk) s_n, the sums exact.

torch has two functions for it: ``_int_mm`` on the plain weight, and ``qlinear`` on a weight that was prepacked once
(unsigned codes, q + 128; signed codes run in a loop that is a thousand times slower). On CPUs without VNNI instructions
both add pairs of products in 16 bits and saturate, so :func:`is_exact` must be checked first.

Shapes: M tokens, N output features, K input features.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["gemm", "is_exact", "prepare"]

SMALL = 2**19  # number of weights up to which _int_mm is faster than qlinear, with its 30 us (bench_packed_cpu.py)
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.compiler.assume_constant_result
def is_exact() -> bool:
    """Whether sums of the largest codes are exact in this process: the CPU has VNNI, and oneDNN uses it."""
    if not torch.cpu._is_vnni_supported():
        return False
    with _disable_current_modes():  # torch.export traces with tensors that have no data
        codes_MK = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
        codes_MK[::2] = -128
        weight_NK = codes_MK[:2]
        sums_MN = (codes_MK.double() @ weight_NK.double().t()).float()
        ones_N = torch.ones(2, dtype=torch.float32, device="cpu")
        packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
        zero_N = torch.zeros(2, dtype=torch.int32, device="cpu")
        results = [_qlinear(codes_MK, packed, ones_N, zero_N), torch._int_mm(codes_MK, weight_NK.t()).float()]
        return all(torch.equal(result, sums_MN) for result in results)


def prepare(weight_NK: Tensor, scale_N: Tensor) -> Operands:
    """The weight, int8 and contiguous, plain and prepacked for qlinear; scales, zeros and scaled sums of codes, [N]."""
    if torch.compiler.is_compiling():  # qlinear_prepack cannot be traced
        packed = weight_NK
    else:
        packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
    scale_N = scale_N.float().contiguous()
    zero_N = torch.zeros(len(weight_NK), dtype=torch.int32, device="cpu")
    return weight_NK, packed, scale_N, zero_N, weight_NK.sum(1, dtype=torch.int32) * scale_N


def gemm(codes_MK: Tensor, scale: Tensor, zero: Tensor | None, operands: Operands) -> Tensor:
    """The product [M, N], float32.

    Args:
        codes_MK: Codes of tokens, int8, contiguous.
        scale: Scales of tokens, float32 [M, 1] or [1].
        zero: Zero points of tokens, in the shape of the scale; None for symmetric codes.
        operands: The weight, from :func:`prepare`.
    """
    weight_NK, packed, scale_N, zero_N, sums_N = operands
    if torch.compiler.is_compiling() or codes_MK.shape[0] == 1 or weight_NK.numel() <= SMALL:
        y_MN = torch._int_mm(codes_MK, weight_NK.t()) * scale_N
    else:
        y_MN = _qlinear(codes_MK, packed, scale_N, zero_N)
    if zero is not None:
        y_MN = y_MN - zero * sums_N
    return y_MN.mul_(scale)


def _qlinear(codes_MK: Tensor, packed: Tensor, scale_N: Tensor, zero_N: Tensor) -> Tensor:
    """The sums times the weight's scale, float32 [M, N]; the process crashes if ``packed`` is not prepacked."""
    unsigned_MK = codes_MK.view(torch.uint8) ^ 128
    y_MN: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned_MK, 1.0, 128, packed, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y_MN
