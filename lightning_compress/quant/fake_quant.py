"""Quantize and dequantize at once, through compressed-tensors, so that a model computes the same after a reload.

There is no gradient for weights, since compressed-tensors works under ``no_grad``; that of inputs passes through.

Dynamic scales of ``token``: compressed-tensors keeps dimensions 0 and 1 of an input. That is one scale per token of
[batch, tokens, features], but one scale for all rows of [batch, features], and one per input channel of an image, which
varies along the sum of the convolution and so has no integer kernel. Here a row has a scale of its own, and so has each
sample of a convolution. Inputs of three dimensions and more are left to compressed-tensors.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from compressed_tensors.quantization import DynamicType, QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from lightning_compress.layers.matrix import CONVOLUTIONS
from lightning_compress.ops.fake_quant import Codes, learned_value, replace_value
from lightning_compress.ops.launches import launching
from lightning_compress.quant.formats import is_microscaled, stored_as
from lightning_compress.quant.scale_errors import integer_range

__all__ = [
    "codes_of",
    "fake_quantize_input",
    "has_rows",
    "latent_of",
    "on_its_device",
    "on_stored_grid",
    "round_weight",
    "wide",
]

BY_ROWS = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR_GROUP)
CACHED = 2**17  # numbers; in pieces a weight of 2.9 million takes 0.37 of the CPU time, and no temporaries of its size


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def codes_of(args: QuantizationArgs) -> Codes:
    """The numbers that the scales of a grid multiply."""
    return Codes(*integer_range(args), args.num_bits if args.type == "float" else 0, is_microscaled(args))


def round_weight(W_RC: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """The nearest point of the grid for every weight, computed in float32 or wider, in the dtype of W.

    ``scale`` is [R, G] per group, [R, 1] per channel, [1] per tensor, one for each block; so is ``zero_point``, None
    for a symmetric grid.
    """
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    if not (W_RC.device.type == "cpu" and args.strategy in BY_ROWS and W_RC.numel() > CACHED):
        with on_its_device(W_RC):
            return stored_as(fake_quantize(wide(W_RC), wide(scale), zero, args), args, W_RC.dtype)
    Q_RC, rows = torch.empty_like(W_RC), max(1, CACHED // W_RC.shape[1])
    pieces = zip(*(tensor.split(rows) for tensor in (Q_RC, W_RC, scale, zero)), strict=True)
    for Q, W, piece_scale, piece_zero in pieces:
        Q.copy_(stored_as(fake_quantize(wide(W), wide(piece_scale), piece_zero, args), args, W.dtype))
    return Q_RC


def on_its_device(x: Tensor) -> AbstractContextManager[None]:
    """Inside, the device of x is the current one, on which compressed-tensors launches its own kernels."""
    return launching(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()


def on_stored_grid(
    Q_RC: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs, dtype: torch.dtype
) -> Tensor:
    """Q in ``dtype``: float32 products of code and scale are not yet those that a float64 reader computes."""
    if dtype != torch.float64 or is_microscaled(args):
        return Q_RC.to(dtype)
    return round_weight(Q_RC.to(dtype), scale, zero_point, args)


def latent_of(A_RC: Tensor, Q_RC: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """``A_RC`` in the dtype of ``Q_RC``, but Q itself wherever A does not round to it: rounded, all of it is Q.

    ``A_RC`` are the values before rounding, ``Q_RC`` is the weight in its own dtype; the grid is as for
    :func:`round_weight`.
    """
    latent_RC = A_RC.to(Q_RC.dtype)
    return torch.where(round_weight(latent_RC, scale, zero_point, args) == Q_RC, latent_RC, Q_RC)


def fake_quantize_input(
    module: nn.Module,
    x: Tensor,
    args: QuantizationArgs,
    scale: Tensor | None,
    zero_point: Tensor | None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """An activation on its grid, with scales from x when ``args.dynamic`` and calibrated ones otherwise.

    NVFP4 has both: scales of 16 columns from x, and ``global_scale``, [1], from calibration. The gradient of the
    value goes to x unchanged; where a static scale requires a gradient, both have those of LSQ.
    """
    if x.numel() == 0:
        return x
    if global_scale is None if args.dynamic == DynamicType.LOCAL else scale is None and not args.dynamic:
        raise ValueError(f"static activations of a {type(module).__name__} need a calibrated scale; calibrate it first")
    scale, zero_point, global_scale = (None if t is None else t.to(x.device) for t in (scale, zero_point, global_scale))
    constant = x.detach()
    if args.dynamic:
        scale, zero_point = _dynamic_scales(module, constant, args, global_scale)
    assert scale is not None
    with on_its_device(x):
        value = fake_quantize(constant, scale.detach(), zero_point, args, global_scale).to(x.dtype)
    if scale.requires_grad and torch.is_grad_enabled():
        return learned_value(x, value, scale, zero_point, codes_of(args), features=1)
    return replace_value(x, value, None) if x.requires_grad and torch.is_grad_enabled() else value


def has_rows(module: nn.Module, x: Tensor, args: QuantizationArgs) -> bool:
    """Whether x is [rows, features] with a dynamic scale per row, for which compressed-tensors takes one scale."""
    return _is_by_token(args) and x.ndim == 2 and not isinstance(module, CONVOLUTIONS)


def _dynamic_scales(
    module: nn.Module, x: Tensor, args: QuantizationArgs, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that broadcast against x."""
    if _is_by_token(args) and isinstance(module, CONVOLUTIONS):
        samples = x.shape[0] if x.ndim == len(module.kernel_size) + 2 else 1  # one sample may come without a batch
    elif has_rows(module, x, args):
        samples = x.shape[0]
    else:
        return compute_dynamic_scales_and_zp(x, args, module, global_scale)
    scale, zero = compute_dynamic_scales_and_zp(x.reshape(1, samples, -1), args, module)
    each = (samples,) + (1,) * (x.ndim - 1)
    return scale.view(each), zero.view(each)


def _is_by_token(args: QuantizationArgs) -> bool:
    return args.dynamic is True and args.strategy == QuantizationStrategy.TOKEN
