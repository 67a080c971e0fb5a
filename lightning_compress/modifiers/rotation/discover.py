"""Which spaces and heads of a model can be turned; what cannot is said by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.layers.matching import clean_name
from lightning_compress.modifiers.rotation.follow import Followed, follow
from lightning_compress.modifiers.rotation.sample import token_run
from lightning_compress.modifiers.rotation.spaces import Head, Space
from lightning_compress.quant.record import Quantized

__all__ = ["Found", "discover", "heads_of", "streams_of"]

ROWS = (2, 8, 64)  # of 16 tokens each: more where a mixture has experts that fewer do not reach


@dataclass
class Found:
    """A model that was followed.

    Args:
        followed: What the run showed.
        run: Makes it again.
    """

    followed: Followed
    run: Callable[[], Any]


def discover(model: nn.Module) -> Found:
    """Follow the model on random token ids, as many as it takes to reach every weight.

    Raises:
        ValueError: It is quantized already, does not run on token ids, or some weight is never used.
    """
    if done := next(iter(Quantized.find(model)), None):
        raise ValueError(f"{done!r} is quantized already; rotate before quantizing, on dense weights")
    if away := next((name for name, p in model.named_parameters() if p.is_meta or not p.numel()), None):
        raise ValueError(f"{away!r} is not in memory, or in parts on several ranks; a model is rotated as a whole")
    missed: list[str] = []
    for rows in ROWS:
        run = token_run(model, rows)
        followed = follow(model, run)
        widths = {space.size for space in followed.spaces if space.sources and not space.fixed}
        missed = [
            clean_name(name)
            for name, p in model.named_parameters()
            if id(p) not in followed.touched and widths.intersection(p.shape)
        ]
        if not missed:
            return Found(followed, run)
    raise ValueError(
        f"{ROWS[-1] * 16} random tokens do not reach {', '.join(missed[:5])}{' and more' if missed[5:] else ''}, so "
        f"that nobody knows whether they read the residual stream; remove what is never used, or leave R1 out"
    )


def streams_of(followed: Followed, model: nn.Module) -> list[Space]:
    """The spaces that begin with a table of embeddings and can be turned: residual streams.

    Raises:
        ValueError: There is none; the message says what stands in the way.
    """
    begun = [space for space in followed.spaces if space.sources]
    free = [space for space in begun if not space.fixed and space.readers]
    if free:
        return free
    widest = max(begun, key=lambda space: len(space.touches), default=None)
    reason = widest.fixed if widest is not None and widest.fixed else "no weight reads what its embeddings give"
    raise ValueError(
        f"R1: the residual stream of {type(model).__name__} cannot be rotated: {reason}; "
        f"leave R1 out (rotations=['R2'])"
    )


def heads_of(followed: Followed, model: nn.Module) -> list[Head]:
    """The heads of all attentions, each once.

    Raises:
        ValueError: There is none.
    """
    heads = list(dict.fromkeys(followed.heads))
    if not heads:
        raise ValueError(
            f"R2: in {type(model).__name__} no weight was seen to multiply the values of an attention head by head "
            f"({followed.attentions} attentions ran); leave R2 out (rotations=['R1'])"
        )
    return heads
