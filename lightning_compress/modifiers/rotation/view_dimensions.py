"""Which dimensions of a tensor those of a view are, by the name of the operation and the shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["dims_of_view", "keeps_last"]

TURNING = ("t", "transpose", "permute", "get", "T", "mT")  # a property such as x.T comes by the name of get


def dims_of_view(name: str, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions of a parameter that the dimensions of a view are; None where that is unknown.

    Args:
        name: Name of the operation with the result ``out``.
        x: The parameter, or a view of it.
        out: The view. The last two of its dimensions are right in the result, others may be 0.
        dims: Dimensions of the parameter that the dimensions of x are.
    """
    if out.shape == x.shape and name not in TURNING:
        return dims
    if name == "getitem" and out.shape == x.shape[1:]:
        return dims[1:]
    if name == "getitem" and x.ndim >= 2 and out.shape[1:] == x.shape[1:]:
        return dims  # some rows of a table
    if name in TURNING and out.ndim == x.ndim >= 2:
        swapped = out.stride()[-2:] == x.stride()[-2:][::-1] and out.shape[-2:] == x.shape[-2:][::-1]
        return (*dims[:-2], dims[-1], dims[-2]) if swapped else None
    if name in ("view", "unsqueeze", "expand", "reshape") and out.shape[-1] == x.shape[-1]:
        return (*(0,) * (out.ndim - 1), dims[-1])
    return None


def keeps_last(name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> bool:
    """Whether the last dimension of ``out = name(x, *args[1:], **kwargs)`` is the one of x, unchanged."""
    if not out.ndim or out.shape[-1] != x.shape[-1]:
        return False
    rest = [*args[1:], *kwargs.values()]
    numbers = [n for n in tree_leaves(rest) if isinstance(n, int) and not isinstance(n, bool)]
    if name in ("transpose", "swapaxes", "swapdims"):
        return not any(n % x.ndim == x.ndim - 1 for n in numbers)
    if name == "permute":
        return numbers[-1] % x.ndim == x.ndim - 1
    if name in ("t", "get", "T", "mT"):
        return out.data_ptr() == x.data_ptr() and out.shape == x.shape
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        used = sum(1 for i in index if i is not None and i is not Ellipsis)
        used += sum(i.ndim - 1 for i in index if isinstance(i, Tensor) and i.dtype == torch.bool)
        if Ellipsis in [i for i in index if not isinstance(i, Tensor)] or used >= x.ndim:
            return isinstance(index[-1], slice) and index[-1] == slice(None)
        return True
    if name in ("repeat_interleave", "index_select", "narrow"):
        dim = kwargs.get("dim", args[1 if name != "repeat_interleave" else 2] if len(args) > 2 else None)
        return isinstance(dim, int) and dim % x.ndim != x.ndim - 1
    if name == "repeat":
        return bool(numbers) and numbers[-1] == 1
    if name == "masked_fill":
        mask, number = args[1], args[2] if len(args) > 2 else kwargs.get("value")
        return isinstance(mask, Tensor) and mask.shape[-1:] == (1,) and number == 0
    return True
