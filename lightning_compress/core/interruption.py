"""A mark on models whose compression was interrupted: some layers are compressed, others are as they were.

Such a model is neither compressed again nor saved; only a new one is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_uninterrupted", "marked_when_interrupted"]

_ATTRIBUTE = "_lightning_compress_interrupted"
SAMPLES = 64  # numbers of each parameter that are compared


@contextmanager
def marked_when_interrupted(model: nn.Module, rows: Callable[[], int]) -> Iterator[None]:
    """Mark the model when the block inside raises and has changed it; an error before any change leaves no mark.

    Args:
        model: Model that is compressed inside.
        rows: How many rows the ledger has: each compressed module adds one.
    """
    before, count = _samples(model), rows()
    try:
        yield
    except BaseException as error:
        if rows() != count or not _equal(before, _samples(model)):
            setattr(model, _ATTRIBUTE, type(error).__name__)
        raise


def check_uninterrupted(model: nn.Module) -> None:
    """ValueError for a model, or one with a part, that bears the mark."""
    for name, module in model.named_modules():
        if (reason := getattr(module, _ATTRIBUTE, None)) is not None:
            which = f"{name!r} ({type(module).__name__})" if name else f"this {type(module).__name__}"
            raise ValueError(
                f"the compression of {which} was interrupted by {reason}: a part of its layers is compressed, the "
                f"others are not; build or load the dense model anew and compress that"
            )


def _samples(model: nn.Module) -> dict[str, Tensor]:
    local = ((name, getattr(p, "to_local", lambda p=p: p)()) for name, p in model.named_parameters() if not p.is_meta)
    flat = ((name, p.detach().reshape(-1)) for name, p in local)
    return {name: values[:: max(1, len(values) // SAMPLES)].clone() for name, values in flat}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name].cpu(), second[name].cpu()) for name in first
    )
