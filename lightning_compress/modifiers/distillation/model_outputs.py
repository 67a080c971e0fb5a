"""Inputs of a model by name, its attention maps, the tokens that count."""

import inspect
from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

__all__ = ["ask_for_attention", "attention_maps", "check_attention", "features_last", "inputs_of", "is_causal",
           "token_mask"]  # fmt: skip


def inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names in the signature of ``forward``."""
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def attention_maps(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of attention maps, [batch, heads, queries, keys] each.

    A student of L layers learns from every (M / L)-th of the teacher's M (Jiao et al. 2020, arXiv:1909.10351).

    Raises:
        ValueError: One gives no maps, or L does not divide M.
    """
    maps, teacher_maps = _maps_of(student, "model"), _maps_of(teacher, "teacher")
    if len(teacher_maps) % len(maps):
        raise ValueError(
            f"attention_weight > 0: the teacher has {len(teacher_maps)} layers and the model {len(maps)}; expected a "
            f"multiple, so that each layer has one to learn from"
        )
    step = len(teacher_maps) // len(maps)
    return list(zip(maps, teacher_maps[step - 1 :: step], strict=True))


def _maps_of(output: Any, model: str) -> tuple[Tensor, ...]:
    maps = getattr(output, "attentions", None)
    if not maps or maps[0] is None:
        raise ValueError(
            f"attention_weight > 0, but the {model} gives no attention maps; use attn_implementation='eager'"
        )
    return tuple(maps)


def features_last(hidden: Tensor, feature_dim: int | None) -> Tensor:
    """A hidden state with its features last; None: they are dimension 1 of maps [batch, channels, height, width]."""
    if feature_dim is None:
        feature_dim = 1 if hidden.dim() in (4, 5) else -1
    return hidden.movedim(feature_dim, -1)


def is_causal(model: nn.Module) -> bool:
    """Whether a Hugging Face model predicts the next token, from labels that stand where the tokens do."""
    return any(c.__name__.endswith(("ForCausalLM", "LMHeadModel")) for c in type(model).__mro__)


def token_mask(
    inputs: Mapping[str, Any], batch: Any, shape: tuple[int, ...], *, ignore_index: int, shift: bool, key: str | None
) -> Tensor | None:
    """True for tokens that count; None when all do.

    Args:
        inputs: Inputs of the model, by name.
        batch: The batch from the loader, which may hold labels and masks, too.
        shape: Shape of the values to average, one entry per token; masks of another shape are ignored.
        ignore_index: Label of tokens that do not count.
        shift: True for models that predict the next token: its label is at the next token.
        key: Name of one more mask; True or 1 for tokens that count.

    Raises:
        ValueError: ``key`` is not a tensor of the batch or the call, or it has another shape.
    """
    known = {**(batch if isinstance(batch, Mapping) else {}), **{k: v for k, v in inputs.items() if v is not None}}

    def fitting(name: str) -> Tensor | None:
        value = known.get(name)
        return value if isinstance(value, Tensor) and tuple(value.shape) == shape else None

    masks = []
    if (attention := fitting("attention_mask")) is not None:
        masks.append(attention.bool())
    if (labels := fitting("labels")) is not None:
        counts = labels != ignore_index
        if shift and counts.dim() > 1:
            counts = counts.roll(-1, 1)
            counts[:, -1] = False  # nothing comes after the last token
        masks.append(counts)
    if key is not None:
        if (extra := fitting(key)) is None:
            value = known.get(key)
            fault = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is not among {sorted(known)}"
            raise ValueError(f"mask_key={key!r} {fault}; expected a mask of shape {shape} in the batch or the call")
        masks.append(extra.bool())
    return reduce(lambda both, mask: both & mask.to(both.device), masks) if masks else None


def check_attention(model: nn.Module) -> None:
    """ValueError where a model cannot return attention maps."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters.values()
    if not any(p.name == "output_attentions" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"attention_weight: the forward of {type(model).__name__} takes no output_attentions, so that it cannot "
            f"return attention maps as models of transformers can; leave it out, or give hidden=..."
        )


def ask_for_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward-pre hook that asks a model of transformers for its attention maps."""
    return args, {**kwargs, "output_attentions": True}
