"""Ops of torch.library: torch.compile and torch.export see a call as one node, and autograd knows its gradient.

Shapes: x [..., K], weight W [N, K] in the layout of its kernel, y = x W^T [..., N].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES

__all__ = ["check_matrices", "check_tokens", "product_op", "register_gradient", "register_op", "skips_dispatcher"]

Op = Callable[..., Any]


def skips_dispatcher(x: Tensor) -> bool:
    """Whether the implementation may be called in place of the op: nothing traces or wraps x, and it needs no gradient.

    The dispatcher costs 30 us, longer than a product with one token takes on a GPU.
    """
    plain = type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())
    return plain and not torch.compiler.is_compiling()


def check_tokens(x: Tensor, weights: Sequence[Tensor]) -> None:
    """ValueError where the kernels do not take the dtype of x, or the weight is on another device."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"x must be float16, bfloat16 or float32, got {x.dtype}; convert it with x.to(torch.bfloat16)")
    if any(t.device != x.device for t in weights):
        raise ValueError(
            f"x is on {x.device}, the weight on {', '.join(str(t.device) for t in weights)}; put them on one device"
        )


def check_matrices(x: Tensor, planes_NP: Tensor, scale_GN: Tensor) -> None:
    """ValueError where the shapes of tokens, packed codes and scales do not fit."""
    if planes_NP.ndim != 2 or scale_GN.ndim != 2 or not x.ndim or scale_GN.shape[1] != planes_NP.shape[0]:
        raise ValueError(
            f"expected x [..., K], planes [N, P] and scale [G, N], got {tuple(x.shape)}, {tuple(planes_NP.shape)} and "
            f"{tuple(scale_GN.shape)}"
        )


def register_op(name: str, schema: str, function: Op, fake: Op, mutates: Sequence[str] = ()) -> Op:
    """The op ``lightning_compress::name``.

    Args:
        name: Name within the namespace.
        schema: Arguments and results, as torch writes them.
        function: The implementation on every device.
        fake: Makes results without data, of the right shape and dtype.
        mutates: Names of the arguments that are written to.
    """
    op = torch.library.custom_op(f"lightning_compress::{name}", function, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    return op


def register_gradient(op: Any, tensors: int, constants: Callable[..., tuple[Any, ...]], backward: Op) -> None:
    """Let the gradient of an op go to its first argument, and to no other.

    Args:
        op: From :func:`register_op`, linear in its first argument.
        tensors: Number of arguments after the first that ``backward`` needs, tensors or None.
        constants: Makes of all arguments what else ``backward`` needs.
        backward: Takes the gradient of the result, the tensors and the constants; gives that of the first argument.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1 : 1 + tensors])
        ctx.constants, ctx.others = constants(*inputs), [None] * (len(inputs) - 1)

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return backward(gradient, *ctx.saved_tensors, *ctx.constants), *ctx.others

    op.register_autograd(gradients, setup_context=save)


def product_op(
    name: str, weight: str, forward: Op, dense: Callable[..., Tensor], *, options: str = "", packed: bool = True
) -> Op:
    """The op y = x W^T, and ``name``_backward, the gradient of x: that of y times W.

    Args:
        name: Name within the namespace.
        weight: Schema of the tensors that hold the weight; the first one has a row for each output feature.
        forward: Takes x, the tensors of the weight and the options; gives y.
        dense: Takes the tensors of the weight, K if it is packed, and a dtype; gives W in this dtype.
        options: Schema of the arguments after the weight.
        packed: The number of columns K does not follow from the shape of the first tensor.
    """

    def product_fake(x: Tensor, rows: Tensor, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rows.shape[0])

    def backward(gradient: Tensor, *arguments: Any) -> Tensor:
        return gradient @ dense(*arguments, gradient.dtype)

    def backward_fake(gradient: Tensor, *arguments: Any) -> Tensor:
        return gradient.new_empty(*gradient.shape[:-1], arguments[-1] if packed else arguments[0].shape[1])

    schema = ", ".join(filter(None, ["Tensor x", weight, options]))
    op = register_op(name, f"({schema}) -> Tensor", forward, product_fake)
    schema = ", ".join(["Tensor gradient", weight, *(["SymInt K"] if packed else [])])
    backward_op = register_op(f"{name}_backward", f"({schema}) -> Tensor", backward, backward_fake)
    register_gradient(op, weight.count("Tensor"), lambda x, *_: (x.shape[-1],) if packed else (), backward_op)
    return op
