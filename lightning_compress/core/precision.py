"""Default dtype, autocast, TF32: the user's while the user's model runs, float32 and none for what we work out.

``Trainer(precision="bf16-true")`` makes bfloat16 the default dtype of all that it encloses, and mixed precision turns
on autocast, in which a product of float32 matrices comes out in bfloat16; ``set_float32_matmul_precision`` rounds the
factors of such a product. Statistics, scales and errors must not depend on these: handlers and hooks of modifiers run
inside :func:`plain_precision`, and what runs the model from there enters :func:`model_precision`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.ops.float32_products import full_float32, matmul_precision, users_float32

__all__ = ["as_product_sees", "matmul_precision", "model_precision", "plain_precision"]

KINDS = ("cpu", "cuda")  # devices with an autocast of their own


@dataclass(frozen=True)
class _Precision:
    """The default dtype, and the dtype of autocast by kind of device; None where it is off."""

    default: torch.dtype
    autocast: tuple[torch.dtype | None, ...] = (None,) * len(KINDS)

    @staticmethod
    def now() -> "_Precision":
        autocast = (torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in KINDS)
        return _Precision(torch.get_default_dtype(), tuple(autocast))


PLAIN = _Precision(torch.float32)
_OUTSIDE: ContextVar[_Precision | None] = ContextVar("precision outside of plain_precision", default=None)


@contextmanager
def plain_precision() -> Iterator[None]:
    """float32 is the default dtype inside, nothing is cast automatically, and no product rounds its factors; nests."""
    before = _Precision.now()
    with ExitStack() as stack:
        if _OUTSIDE.get() is None:
            stack.callback(_OUTSIDE.reset, _OUTSIDE.set(before))
        stack.enter_context(_changed(before, PLAIN))
        stack.enter_context(full_float32())
        yield


@contextmanager
def model_precision(exact: bool = False) -> Iterator[None]:
    """Inside, the precision is what it was outside of :func:`plain_precision`; without one nothing changes.

    Args:
        exact: The default dtype alone is, for outputs that are compared: nothing is cast automatically or rounded.
    """
    before = _Precision.now()
    outside = _OUTSIDE.get() or before
    wanted, products = (_Precision(outside.default), full_float32()) if exact else (outside, users_float32())
    with _changed(before, wanted), products:
        yield


def as_product_sees(x: Tensor) -> Tensor:
    """x in the dtype that a Linear of the model multiplies it in: that of autocast where the model runs under it."""
    precision = _OUTSIDE.get() or _Precision.now()
    dtype = dict(zip(KINDS, precision.autocast, strict=True)).get(x.device.type)
    return x if dtype is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


@contextmanager
def _changed(before: _Precision, wanted: _Precision) -> Iterator[None]:
    if before == wanted:
        yield
        return
    with ExitStack() as stack:
        if before.default != wanted.default:
            stack.callback(torch.set_default_dtype, before.default)
            torch.set_default_dtype(wanted.default)
        for kind, was, dtype in zip(KINDS, before.autocast, wanted.autocast, strict=True):
            if was != dtype:
                cached = torch.is_autocast_cache_enabled()
                stack.enter_context(torch.autocast(kind, dtype or was, enabled=dtype is not None, cache_enabled=cached))
        yield
