"""The input of a packed Linear on its grid: as codes for an integer product, or as values for a dense one.

Codes and scales are those of compressed-tensors' fake-quantize, in the dtype of x. It gives every token a scale of its
own where x is [batch, tokens, K], and all of x one scale where x has one or two dimensions.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lightning_compress.ops.fake_quant import replace_value
from lightning_compress.quant.fake_quant import fake_quantize_input

__all__ = ["input_codes", "input_values"]

HALF_RANGE, LOWEST, HIGHEST = 127.5, -128, 127


def input_codes(
    x: Tensor, args: QuantizationArgs, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 like x, what they are multiplied by, and their zero points (None: symmetric).

    Args:
        x: [..., K], floating.
        args: 8-bit integers, by token or by tensor.
        scale: [1], of static inputs; None: found from x.
        zero: [1], of static asymmetric inputs.
    """
    if args.dynamic:
        scale, zero = _dynamic(x, args)
    assert scale is not None
    codes = x / scale
    if zero is not None:
        codes += zero.to(codes.dtype)
    return codes.round_().clamp_(LOWEST, HIGHEST).to(torch.int8), scale, zero


def _dynamic(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, for each token or for all, in the dimensions of x."""
    whole = args.strategy == "tensor" or x.ndim < 3
    dims = tuple(range(x.ndim)) if whole else tuple(range(2, x.ndim))
    tiny = torch.finfo(x.dtype).tiny
    if args.symmetric:
        return torch.linalg.vector_norm(x, torch.inf, dims, keepdim=True).div_(HALF_RANGE).clamp_min_(tiny), None
    low, high = x.amin(dims, keepdim=True).clamp_max_(0), x.amax(dims, keepdim=True).clamp_min_(0)
    scale = ((high - low) / (2 * HALF_RANGE)).clamp_min_(tiny)
    return scale, (LOWEST - low / scale).clamp_(LOWEST, HIGHEST).round_()


def input_values(
    module: nn.Module,
    x: Tensor,
    args: QuantizationArgs,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
) -> Tensor:
    """x on its grid; the gradient passes straight through to it."""
    value = fake_quantize_input(module, x.detach(), args, scale, zero, global_scale)
    return replace_value(x, value, None) if x.requires_grad and torch.is_grad_enabled() else value
