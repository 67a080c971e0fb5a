"""The sizes in the config of a transformers model, and whether it can state the sizes after a cut.

As a check, the architecture is built from the changed config, without weights, and must have every shape after the cut.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["check_states", "head_fields", "is_transformers", "layer_fields", "mlp_fields"]

MLP_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim", "encoder_ffn_dim",
              "decoder_ffn_dim")  # fmt: skip
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def is_transformers(model: nn.Module) -> bool:
    """True for a PreTrainedModel; transformers is not imported."""
    return any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)


def mlp_fields(config: Any, before: int, after: int) -> dict[str, int]:
    """Fields that count the neurons of an MLP, with their new value."""
    fields = {f: after for f in MLP_FIELDS if getattr(config, f, None) == before}
    if not fields and hasattr(config, "n_inner") and config.n_inner is None:
        fields["n_inner"] = after  # GPT-2: four times the width, unless it is given
    return fields


def head_fields(config: Any, before: int, after: int, dim: int) -> dict[str, int]:
    """Fields that count heads, when ``after`` of ``before`` key/value heads stay; ``dim`` is the size of one head."""
    fields = {}
    for name in ("num_attention_heads", "num_key_value_heads"):
        if isinstance(value := getattr(config, name, None), int):
            fields[name] = value * after // before
    if fields:
        fields["head_dim"] = dim  # else it would follow from the number of heads
    return fields


def layer_fields(config: Any, before: int, kept: Sequence[int]) -> dict[str, Any]:
    """Fields that count layers or hold one entry for each."""
    fields: dict[str, Any] = {f: len(kept) for f in LAYER_FIELDS if getattr(config, f, None) == before}
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before and not name.startswith("_"):
            fields[name] = [value[i] for i in kept]
    return fields


def check_states(model: nn.Module, fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], advice: str) -> None:
    """ValueError unless a model built from the config with ``fields`` has exactly these parameters.

    ``shapes`` are those of every parameter after the cut; ``advice`` says what the user can do instead.
    """
    config = copy.deepcopy(model.config)
    for key, value in fields.items():
        setattr(config, key, value)
    try:
        with torch.device("meta"):
            built = {name: list(p.shape) for name, p in type(model)(config).named_parameters()}
    except Exception as error:
        raise ValueError(
            f"the config of {type(model).__name__} cannot state the sizes after pruning ({dict(fields)}: {error}), so "
            f"that the model could not be loaded; {advice}"
        ) from error
    wrong = [n for n in {**built, **shapes} if built.get(n) != (list(shapes[n]) if n in shapes else None)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the config of {type(model).__name__} cannot state the sizes after pruning, so that the model could not "
            f"be loaded: {name!r} would be {list(shapes.get(name, ()))}, and a config with {dict(fields)} makes it "
            f"{built.get(name)}; {advice}"
        )
