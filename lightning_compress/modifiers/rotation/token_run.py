"""A run of a model on a few random token ids."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_compress.layers.forward import eval_mode

__all__ = ["token_run"]

TOKENS = 16


def token_run(model: nn.Module, rows: int, seed: int = 0) -> Callable[[], Any]:
    """A function that runs the model, in eval mode and without gradients, on the same [rows, 16] token ids each time.

    Raises:
        ValueError: The model has no table of embeddings, or (when the function is called) does not run on token ids.
    """
    table = _table(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table.num_embeddings, (rows, TOKENS), generator=generator).to(table.weight.device)
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
