"""The spaces and heads of a model that can be turned, seen in a run on token ids; an error names what prevents it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_compress.layers.forward import eval_mode
from lightning_compress.layers.matching import clean_name
from lightning_compress.modifiers.rotation.follow import follow
from lightning_compress.modifiers.rotation.marks import Marks
from lightning_compress.modifiers.rotation.spaces import Head, Space
from lightning_compress.quant.record import Quantized

__all__ = ["discover", "heads_of", "streams_of", "token_run"]

TOKENS = 16
ROWS = (2, 8, 64)  # of 16 tokens each: more where a mixture has experts that fewer do not reach


def discover(model: nn.Module) -> tuple[Marks, Callable[[], Any]]:
    """The trace of a run on random token ids, as many as it takes to reach every weight, and what repeats the run.

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
            return trace, run
    raise ValueError(
        f"{ROWS[-1] * TOKENS} random tokens do not reach {', '.join(missed[:5])}{' and more' if missed[5:] else ''}, "
        f"so that it is unknown whether they read the residual stream; remove weights that are never used, or leave "
        f"R1 out"
    )


def streams_of(trace: Marks, model: nn.Module) -> list[Space]:
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


def heads_of(trace: Marks, model: nn.Module) -> list[Head]:
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


def token_run(model: nn.Module, rows: int, seed: int = 0) -> Callable[[], Any]:
    """A function that runs the model, in eval mode and without gradients, on the same [rows, 16] token ids each time.

    Raises:
        ValueError: The model has no table of embeddings, or (when the function is called) does not run on token ids.
    """
    table = _table(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table.num_embeddings, (rows, TOKENS), generator=generator, device="cpu").to(
        table.weight.device
    )
    forward = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    config = getattr(model, "config", None)
    keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in forward else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in forward:
        keywords["decoder_input_ids"] = ids

    def run() -> Any:
        try:
            with torch.inference_mode(False), torch.no_grad(), eval_mode(model):
                return model(input_ids=ids, **keywords) if "input_ids" in forward else model(ids)
        except Exception as error:
            raise ValueError(
                f"rotation follows a run on token ids, and {type(model).__name__} does not run on "
                f"[{rows}, {TOKENS}] of them: {error}; only models of token ids can be rotated"
            ) from error

    return run


def _table(model: nn.Module) -> nn.Embedding:
    """The table of the tokens: the input embeddings of a model of transformers, else the first table."""
    table, get_table = None, getattr(model, "get_input_embeddings", None)
    if callable(get_table):
        try:
            table = get_table()
        except NotImplementedError:
            table = None
    if not isinstance(table, nn.Embedding):
        table = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if table is None:
        raise ValueError(
            f"{type(model).__name__} has no nn.Embedding, so that its residual stream does not begin with token ids; "
            f"only models of token ids can be rotated"
        )
    return table
