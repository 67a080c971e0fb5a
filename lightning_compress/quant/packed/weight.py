"""The ``weight`` of a packed Linear: a tensor that becomes dense when its numbers are needed.

peft, and models such as T5, ask a Linear for the dtype or the device of its weight; that costs nothing. Arithmetic on
it gets the dequantized weight, anew each time. Writing to it is an error, since the new values would be lost.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["PackedWeight"]

WRITERS = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


class PackedWeight(Tensor):
    """A tensor [N, K] without memory of its own."""

    dense: Callable[[], Tensor]  # returns the dense weight, in the dtype of this tensor

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, dense: Callable[[], Tensor]
    ) -> "PackedWeight":
        one = torch.full((), torch.nan, dtype=dtype, device=device)  # code that bypasses this class reads NaN
        weight = one.expand(shape).as_subclass(cls)
        weight.dense = dense
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return metadata as they are, keep ``data`` and ``detach`` packed, compute the rest with the dense weight."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        target = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init passes it by name
        if isinstance(target, PackedWeight):
            if name in WRITERS or (name.endswith("_") and not name.endswith("__")):
                raise ValueError(
                    "the weight of a packed Linear cannot be written, as merging an adapter does; load the folder with "
                    "packed=False, merge there, then lightning_compress.dequantize(model) and compress again"
                )
            if func in (torch.Tensor.data.__get__, torch.Tensor.detach):  # type: ignore[attr-defined]
                return target
            if name == "__get__":
                with torch._C.DisableTorchFunctionSubclass():
                    value = func(*args)
                if not isinstance(value, Tensor):
                    return value
        dense_args, dense_kwargs = tree_map_only(PackedWeight, lambda weight: weight.dense(), (args, kwargs))
        return func(*dense_args, **dense_kwargs)
