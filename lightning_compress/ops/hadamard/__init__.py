"""x times a Hadamard matrix of order n = m 2^k, for online rotations: y = x (B (x) S) scale, S Sylvester's matrix.

On CUDA a Triton kernel reads x and writes y once; elsewhere torch computes butterflies. README beside this file.

Shapes: x [..., n], n = m P, base B [m, m] of +-1, P a power of two.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.float32_products import full_float32
from lightning_compress.ops.registration import register_gradient, register_op

__all__ = ["hadamard_transform"]


def hadamard_transform(x: Tensor, base_mm: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The product x (B (x) S_P) scale, in the dtype of x, with a gradient for x.

    Args:
        x: [..., n], floating point.
        base_mm: Hadamard matrix B of the order that remains beside a power of two; None where n is a power of two. B^T
            in place of B, with scale 1 / (n scale), gives the inverse transform.
        scale: Factor of the result; 1 / sqrt(n) makes the transform orthogonal.

    Raises:
        ValueError: n is not a power of two times the order of the base, or x is not floating.
    """
    m = 1 if base_mm is None else len(base_mm)
    n = x.shape[-1] if x.ndim else 0
    if not x.is_floating_point() or (base_mm is not None and base_mm.shape != (m, m)):
        base = "" if base_mm is None else f" and base {tuple(base_mm.shape)}"
        raise ValueError(f"expected floating x [..., n] and a base [m, m], got {x.dtype} {tuple(x.shape)}{base}")
    if n < m or n % m or (n // m) & (n // m - 1):
        raise ValueError(
            f"x has {n} features, which is not a power of two times {m}, the order of the base; pass a base of order "
            f"{n // (n & -n) if n else 0} times a power of two"
        )
    if base_mm is not None and base_mm.device != x.device:
        raise ValueError(f"x is on {x.device} and the base on {base_mm.device}; put them on one device")
    plain = not (x.requires_grad and torch.is_grad_enabled())
    if calls_kernel(x) and plain:
        return _transform(x, base_mm, scale)
    if x.is_cuda:
        y: Tensor = _transform_op(x, base_mm, scale)
        return y
    return _butterflies(x, base_mm, scale)


def _transform(x: Tensor, base_mm: Tensor | None, scale: float) -> Tensor:
    if x.is_cuda and x.dtype in KERNEL_DTYPES and x.numel() and _kernel_runs(x, base_mm):
        from lightning_compress.ops.hadamard.kernel import transform

        with full_float32():  # large bases and rows end in a product
            return transform(x, base_mm, scale)
    return _butterflies(x, base_mm, scale)


def _kernel_runs(x: Tensor, base_mm: Tensor | None) -> bool:
    P = x.shape[-1] // (1 if base_mm is None else len(base_mm))
    return P >= 16 and kernel_runs(x.device, "Hadamard transforms read and write memory once for each factor of two")


def _butterflies(x: Tensor, base_mm: Tensor | None, scale: float) -> Tensor:
    """The transform in O(n (m + log n)), in the dtype of x; differentiable."""
    m = 1 if base_mm is None else len(base_mm)
    power, half = x.shape[-1] // m, 1
    y = x.reshape(-1, m, power)
    while half < power:
        first, second = y.reshape(-1, m, power // (2 * half), 2, half).unbind(3)
        y = torch.stack([first + second, first - second], 3).reshape(-1, m, power)
        half *= 2
    if base_mm is not None:
        with nullcontext() if torch.compiler.is_compiling() else full_float32():
            y = torch.einsum("nap,ab->nbp", y, base_mm.to(x))
    return (y if scale == 1 else y * scale).reshape(x.shape)


def _new_transform(x: Tensor, base_mm: Tensor | None, scale: float) -> Tensor:
    """The transform as a new tensor, as an op must return; of one feature with scale 1 it is x itself."""
    y = _transform(x, base_mm, scale)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def _gradient(gradient: Tensor, base_mm: Tensor | None, scale: float) -> Tensor:
    x: Tensor = _transform_op(gradient.contiguous(), None if base_mm is None else base_mm.t(), scale)
    return x


_transform_op = register_op(
    "hadamard_transform",
    "(Tensor x, Tensor? base, float scale) -> Tensor",
    _new_transform,
    lambda x, base, scale: x.new_empty(x.shape),
)
register_gradient(_transform_op, 1, lambda x, base, scale: (scale,), _gradient)
