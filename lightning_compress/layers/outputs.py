"""The logits in what a model returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["logits_of"]


def logits_of(output: Any, class_dim: int = -1) -> Tensor:
    """Logits with their classes last: a tensor, ``.logits``, ``["logits"]``, or the first of a tuple.

    Raises:
        ValueError: The output has no logits.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"found no logits in an output of type {type(output).__name__}; expected a tensor, .logits, ['logits'], or "
            f"a tuple that begins with them"
        )
    return logits.movedim(class_dim, -1)
