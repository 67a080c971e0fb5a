"""Quantize and dequantize in one pass, with gradients: straight-through, or with a learned scale (LSQ).

The value is bit for bit that of compressed-tensors for the stored scale (computed in float32, rounded to the dtype of W
at the end); equations and gradients are in reference.py. Only W, its scale and its zero point are saved for backward.
On CUDA one kernel computes the value, and another one all gradients (README beside this file).

Shapes: R rows, C columns, G groups of C / G columns; scale and zero point [1], [R, 1] or [R, G].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.fake_quant.reference import HALF_STEP
from lightning_compress.ops.gptq_block.grid import round_float_

__all__ = ["HALF_STEP", "Codes", "learned_step", "learned_value", "relative_step", "replace_value", "straight_through"]


class Codes(NamedTuple):
    """The numbers that are multiplied by a scale.

    Args:
        low: Lowest code.
        high: Highest code.
        float_bits: Codes are floats: 4 (E2M1), 6 (E2M3) or 8 (E4M3) bits; 0: integers.
        through_bf16: The value is rounded to bfloat16 before the dtype of W, as readers of NVFP4 and MXFP4 do.
    """

    low: float
    high: float
    float_bits: int = 0
    through_bf16: bool = False


def straight_through(W_RC: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes) -> Tensor:
    """The quantized weight, [R, C]; its gradient goes to W unchanged, except where W is clamped: there it is 0.

    Numbers that round to the last value of the grid are not clamped: the range extends half a step beyond it. So the
    largest weight of a group whose scale is its extreme / 7.5 keeps its gradient.

    Args:
        W_RC: Weight, any floating dtype.
        scale: Positive scales, [1], [R, 1] or [R, G]; they get no gradient.
        zero: Zero points, integers of any dtype in the shape of the scale; None for 0.
        codes: The numbers to round to.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    _check(W_RC, scale, zero)
    return _StraightThrough.apply(W_RC, scale, zero, codes)


def learned_step(W_RC: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, count: int | None = None) -> Tensor:
    """The quantized weight, [R, C], with the gradients of LSQ for W and for the scale.

    The scale's gradient is multiplied by 1 / sqrt(N high), N being ``count``, by default the number of weights of one
    scale. Other arguments and errors are those of :func:`straight_through`.
    """
    _check(W_RC, scale, zero)
    return _LearnedStep.apply(W_RC, scale, zero, codes, count or W_RC.numel() // scale.numel())


def learned_value(x: Tensor, value: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, features: int) -> Tensor:
    """``value``, with the gradients of LSQ for the activation x and for its scale.

    x has any shape and floating dtype; ``value`` is x rounded to the grid, as the exported model computes it;
    ``features`` is N in 1 / sqrt(N high), the factor of the gradient of the scale [1]. The others are those of
    :func:`straight_through`.
    """
    return _LearnedValue.apply(x, value, scale, zero, codes, features)


def relative_step(start: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale s = start * (1 + change), positive, in ``dtype``; ``change`` gets the gradient ds / start.

    A scale is about a hundred times smaller than 1, and a step of Adam has the size of the learning rate for every
    parameter; with ``change`` as the parameter, a step is relative to the scale. Under SGD, s changes exactly as if it
    were the parameter itself: the gradient is divided by ``start``, not multiplied, and ds = start * dchange. Weight
    decay pulls s back to ``start``.

    Args:
        start: Initial scale, positive; it gets no gradient.
        change: The parameter, in the shape of ``start``, initially 0.
        dtype: Dtype of the weight, which stores the scales.
    """
    return _RelativeStep.apply(start, change, dtype)


def replace_value(x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
    """``value``; its gradient goes to x where ``inside`` is True (None: everywhere)."""
    return _ReplaceValue.apply(x, value, inside)


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, W_RC: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, *_: Any) -> Tensor:
        ctx.save_for_backward(W_RC, scale, zero)
        ctx.codes = codes
        return _value(W_RC, scale, zero, codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RC: Tensor) -> tuple[Tensor | None, ...]:
        W_RC, scale, zero = ctx.saved_tensors
        low, high, float_bits, _ = ctx.codes
        half = HALF_STEP[float_bits]
        if _takes_kernel(W_RC):
            from lightning_compress.ops.fake_quant import kernel

            of_W, _ = kernel.gradients(gradient_RC, W_RC, scale, zero, low, high, float_bits, half, (True, False))
            return of_W, None, None, None
        v_RGg, _, _ = _scaled(W_RC, scale, zero)
        inside = (v_RGg >= low - half) & (v_RGg <= high + half)
        return gradient_RC * inside.view(W_RC.shape), None, None, None


class _LearnedStep(_StraightThrough):  # with the same forward
    @staticmethod
    def forward(ctx: Any, W_RC: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, count: int) -> Tensor:
        ctx.count = count
        return _StraightThrough.forward(ctx, W_RC, scale, zero, codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RC: Tensor) -> tuple[Tensor | None, ...]:
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        W_RC, scale, zero = ctx.saved_tensors
        gradients = _learned_gradients(gradient_RC, W_RC, scale, zero, ctx.codes, count=ctx.count, needed=needed)
        return *gradients, None, None, None


class _LearnedValue(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, features: int
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.codes, ctx.features = codes, features
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        x_1N, gradient_1N = x.reshape(1, -1), gradient.reshape(1, -1)
        of_x, of_scale = _learned_gradients(
            gradient_1N, x_1N, scale, zero, ctx.codes, count=ctx.features, needed=needed
        )
        return None if of_x is None else of_x.view(x.shape), None, of_scale, None, None, None


class _RelativeStep(Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(start, change)
        wide = torch.promote_types(start.dtype, torch.float32)
        scale = start.to(wide) * (1 + change.to(wide))
        return scale.abs().to(dtype).clamp_min(torch.finfo(dtype).tiny)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        start, change = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(start.dtype, torch.float32)) / start
        return None, torch.where(change < -1, -wide, wide).to(change.dtype), None


class _ReplaceValue(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None


def _learned_gradients(
    gradient_RC: Tensor,
    W_RC: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Codes,
    *,
    count: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of W [R, C] and of the scale (in its shape, divided by sqrt(count high)); None if not needed."""
    low, high, float_bits, _ = codes
    if _takes_kernel(W_RC):
        from lightning_compress.ops.fake_quant import kernel

        of_W, summed = kernel.gradients(gradient_RC, W_RC, scale, zero, low, high, float_bits, None, needed)
        return of_W, None if summed is None else (summed / (count * high) ** 0.5).to(scale.dtype)
    v_RGg, _, z_RG1 = _scaled(W_RC, scale, zero)
    inside_RGg = (v_RGg > low) & (v_RGg < high)
    gradient_RGg = gradient_RC.reshape(v_RGg.shape)
    gradient_W = (gradient_RGg * inside_RGg).view(W_RC.shape) if needed[0] else None
    if not needed[1]:
        return gradient_W, None
    c_RGg = v_RGg.clamp(low, high)
    outside_RGg = c_RGg if z_RG1 is None else c_RGg - z_RG1
    slope_RGg = torch.where(inside_RGg, _round(c_RGg.clone(), float_bits).sub_(v_RGg), outside_RGg)  # z cancels inside
    summed_RG = slope_RGg.mul_(gradient_RGg).sum(-1)
    summed = summed_RG.sum().view(1) if scale.ndim == 1 else summed_RG
    return gradient_W, (summed / (count * high) ** 0.5).to(scale.dtype)


def _value(W_RC: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes) -> Tensor:
    low, high, float_bits, through_bf16 = codes
    if _takes_kernel(W_RC):
        from lightning_compress.ops.fake_quant import kernel

        return kernel.value(W_RC, scale, zero, *codes)
    v_RGg, s_RG1, z_RG1 = _scaled(W_RC, scale, zero)
    q_RGg = _round(v_RGg.clamp_(low, high), float_bits)
    q_RGg = q_RGg if z_RG1 is None else q_RGg - z_RG1
    Q_RC = (q_RGg * s_RG1).view(W_RC.shape)
    return (Q_RC.to(torch.bfloat16) if through_bf16 else Q_RC).to(W_RC.dtype)


def _takes_kernel(W_RC: Tensor) -> bool:
    """Whether the kernel runs; compiled code uses torch's arithmetic, which the compiler fuses as well."""
    if not calls_kernel(W_RC) or W_RC.dtype not in KERNEL_DTYPES or not W_RC.numel():
        return False
    return kernel_runs(W_RC.device, "weights are quantized by a dozen kernels of torch")


def _scaled(W_RC: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A new tensor v = W / s + z [R, G, g] (per tensor: G = 1), and s and z [R or 1, G, 1], in float32 or wider."""
    wide = torch.promote_types(W_RC.dtype, torch.float32)
    G = scale.shape[-1]
    s_RG1 = scale.to(wide).view(-1, G, 1)
    v_RGg = W_RC.to(wide).reshape(W_RC.shape[0], G, -1) / s_RG1  # len() would fix the rows of an exported graph
    if zero is None:
        return v_RGg, s_RG1, None
    z_RG1 = zero.to(wide).view(-1, G, 1)
    return v_RGg.add_(z_RG1), s_RG1, z_RG1


def _round(v: Tensor, float_bits: int) -> Tensor:
    """The nearest codes, a new tensor or v itself."""
    if float_bits == 8:
        return v.to(torch.float8_e4m3fn).to(v.dtype)
    return round_float_(v, float_bits) if float_bits else v.round()


def _check(W_RC: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    if not W_RC.is_floating_point() or not scale.is_floating_point():
        raise ValueError(f"expected a floating W and scale, got {W_RC.dtype} and {scale.dtype}; convert them")
    devices = {str(t.device) for t in (W_RC, scale, zero) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"W, scale and zero point are on {', '.join(sorted(devices))}; put them on one device")
    by_row = W_RC.ndim == scale.ndim == 2 and scale.shape[0] == W_RC.shape[0] and W_RC.shape[1] % scale.shape[1] == 0
    fits = by_row or (W_RC.ndim == 2 and scale.shape == (1,))
    if not fits or (zero is not None and zero.shape != scale.shape):
        zero_point = "" if zero is None else f" and zero point {tuple(zero.shape)}"
        raise ValueError(
            f"expected W [R, C] and a scale [1], [R, 1] or [R, G] with G a divisor of C, and a zero point of its "
            f"shape; got W {tuple(W_RC.shape)}, scale {tuple(scale.shape)}{zero_point}"
        )
