"""Products of float32 matrices in float32, although the user has allowed fewer bits for them.

``torch.set_float32_matmul_precision("high")``, which Lightning advises, lets a GPU round the factors of every float32
product to TF32, with 10 bits of a mantissa in place of 23; "medium" lets some CPUs round them to bf16. A user means the
model. A Hessian, its factor and what is solved with it must not depend on that.

The setting is one of the process: it is changed when the first thread enters :func:`full_float32`, and put back when
the last one leaves.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["full_float32", "matmul_precision", "users_float32"]

BACKENDS: Any = torch.backends  # its modules hide attributes from type checkers
FULL = ("ieee", "none")  # values of fp32_precision; "none" stands for torch's default


@dataclass(frozen=True)
class _Setting:
    """``legacy`` is None where the newer interface was used, which torch's older one refuses to describe."""

    legacy: str | None
    cuda: str
    mkldnn: str

    @staticmethod
    def now() -> "_Setting":
        try:
            legacy: str | None = torch.get_float32_matmul_precision()
        except RuntimeError:
            legacy = None
        return _Setting(legacy, BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision)

    @property
    def is_full(self) -> bool:
        return self.legacy in (None, "highest") and self.cuda in FULL and self.mkldnn in FULL

    def restore(self) -> None:
        if self.legacy is not None:
            torch.set_float32_matmul_precision(self.legacy)
        for matmul, value in ((BACKENDS.cuda.matmul, self.cuda), (BACKENDS.mkldnn.matmul, self.mkldnn)):
            if matmul.fp32_precision != value:  # "none": the value of all backends together
                matmul.fp32_precision = "none" if value == BACKENDS.fp32_precision else value


class _Guard:
    """Counts the threads inside."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: _Setting | None = None  # what the user has set, where that was changed

    def count(self, difference: int) -> None:
        with self._lock:
            self._inside += difference
            if self._inside == difference == 1 and not (setting := _Setting.now()).is_full:
                self._before = setting
                torch.set_float32_matmul_precision("highest")
            elif not self._inside and self._before is not None:
                self._before.restore()
                self._before = None


_GUARD = _Guard()
_INSIDE: ContextVar[bool] = ContextVar("inside full_float32", default=False)


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 matrices are multiplied in float32; nests, also with :func:`users_float32`."""
    if _INSIDE.get():
        yield
        return
    with _counted(True, 1):
        yield


@contextmanager
def users_float32() -> Iterator[None]:
    """Inside, float32 matrices are multiplied as the user has set it, although this is inside of full_float32."""
    if not _INSIDE.get():
        yield
        return
    with _counted(False, -1):
        yield


def matmul_precision() -> str:
    """How the user lets float32 matrices be multiplied: ``highest``, ``high``, ``medium``, or values by backend."""
    setting = _GUARD._before or _Setting.now()
    return setting.legacy or f"cuda {setting.cuda}, mkldnn {setting.mkldnn}"


@contextmanager
def _counted(inside: bool, difference: int) -> Iterator[None]:
    token = _INSIDE.set(inside)
    _GUARD.count(difference)
    try:
        yield
    finally:
        _GUARD.count(-difference)
        _INSIDE.reset(token)
