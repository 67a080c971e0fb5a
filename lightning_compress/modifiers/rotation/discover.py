"""The spaces and heads of a model that can be turned; an error names what stands in the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.layers.matching import clean_name
from lightning_compress.modifiers.rotation.follow import BasisTrace, follow
from lightning_compress.modifiers.rotation.spaces import Head, Space
from lightning_compress.modifiers.rotation.token_run import token_run
from lightning_compress.quant.record import Quantized

__all__ = ["TracedModel", "discover", "heads_of", "streams_of"]

ROWS = (2, 8, 64)  # of 16 tokens each: more where a mixture has experts that fewer do not reach


@dataclass
class TracedModel:
    """The trace of a model.

    Args:
        trace: Spaces, heads and products of the run.
        run: Repeats the run.
    """

    trace: BasisTrace
    run: Callable[[], Any]


def discover(model: nn.Module) -> TracedModel:
    """Follow the model on random token ids, as many as it takes to reach every weight.

    Raises:
        ValueError: It is quantized already, does not run on token ids, or some weight is never used.
    """
    if name := next(iter(Quantized.find(model)), None):
        raise ValueError(f"{name!r} is quantized already; rotate before quantizing, on dense weights")
    if name := next((name for name, p in model.named_parameters() if p.is_meta or not p.numel()), None):
        raise ValueError(f"{name!r} is not in memory, or split over ranks; rotation needs the complete model")
    missed: list[str] = []
    for rows in ROWS:
        run = token_run(model, rows)
        trace = follow(model, run)
        widths = {space.size for space in trace.spaces if space.sources and not space.fixed}
        missed = [
            clean_name(name)
            for name, p in model.named_parameters()
            if id(p) not in trace.touched and widths.intersection(p.shape)
        ]
        if not missed:
            return TracedModel(trace, run)
    raise ValueError(
        f"{ROWS[-1] * 16} random tokens do not reach {', '.join(missed[:5])}{' and more' if missed[5:] else ''}, so "
        f"that it is unknown whether they read the residual stream; remove weights that are never used, or leave R1 out"
    )


def streams_of(trace: BasisTrace, model: nn.Module) -> list[Space]:
    """The spaces that begin with a table of embeddings and can be turned: residual streams.

    Raises:
        ValueError: No space can be turned; the message says what stands in the way.
    """
    streams = [space for space in trace.spaces if space.sources]
    free = [space for space in streams if not space.fixed and space.readers]
    if free:
        return free
    widest = max(streams, key=lambda space: len(space.touches), default=None)
    reason = widest.fixed if widest is not None and widest.fixed else "no weight reads the output of its embeddings"
    raise ValueError(
        f"R1: the residual stream of {type(model).__name__} cannot be rotated: {reason}; "
        f"leave R1 out (rotations=['R2'])"
    )


def heads_of(trace: BasisTrace, model: nn.Module) -> list[Head]:
    """The heads of all attentions, each once.

    Raises:
        ValueError: No attention head was seen.
    """
    heads = list(dict.fromkeys(trace.heads))
    if not heads:
        raise ValueError(
            f"R2: in {type(model).__name__} no weight was seen to multiply the values of an attention head by head "
            f"({trace.attentions} attentions ran); leave R2 out (rotations=['R1'])"
        )
    return heads
