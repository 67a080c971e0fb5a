"""A mark on models whose compression was interrupted: some layers are compressed, others are as they were.

Such a model is neither compressed again nor saved; only a new one is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    return {name: _sample(parameter) for name, parameter in model.named_parameters() if not parameter.is_meta}


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)].cpu().clone()


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and bool((first[name] == second[name]).all()) for name in first
    )
