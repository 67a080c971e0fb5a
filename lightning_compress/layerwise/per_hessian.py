"""What is computed once for each Hessian, and shared by all its layers."""

import weakref
from typing import Any, TypeVar

from lightning_compress.layerwise.input_hessian import SharedHessian

__all__ = ["PerHessian"]

T = TypeVar("T")


class PerHessian(weakref.WeakKeyDictionary[SharedHessian, T]):
    """Results for each statistic, kept for as long as the statistic lives; a pickled one is empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PerHessian, ()
