"""What may fail after a model is compressed without harm to it: a warning that names the part, and the run goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["as_warning"]


@contextmanager
def as_warning(part: str) -> Iterator[None]:
    """Inside, an error becomes a warning; ``part`` says what is not complete, such as ``the page``."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{part} is not complete, while the compressed model is: {type(error).__name__}: {error}")
