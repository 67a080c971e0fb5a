"""Parametrizations of parameters that several slices share: each slice passes through a step of its own.

    parameter  ->  steps[key](slice) for each slice  ->  joined again

The parameter stays the only one, under its own name in every state dict.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.layers.sharded import is_dtensor
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = ["RowSlices", "add_step", "has_steps", "remove_step", "restore_home"]

_ORDER = "_lightning_compress_names_of_parameters"


class RowSlices(nn.Module):
    """The parametrization of a matrix whose slices are blocks of rows.

    Args:
        sizes: Rows of each slice, in order.
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.steps = nn.ModuleDict()  # by WeightSlice.key

    def forward(self, fused: Tensor) -> Tensor:
        if is_dtensor(fused):  # between forward passes
            return fused
        pieces, row = [], 0
        for piece_RC in fused.split(self.sizes):
            key = str(row)
            pieces.append(self.steps[key](piece_RC) if key in self.steps else piece_RC)
            row += len(piece_RC)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def add_step(linear: WeightSlice, slices: nn.Module, step: nn.Module) -> None:
    """Let a slice pass through a step; ``slices`` is the parametrization of a parameter that has none yet.

    Raises:
        ValueError: The slice has a step already.
    """
    home = linear.home
    if _ORDER not in home.__dict__:
        home.__dict__[_ORDER] = list(home._parameters)
        home.register_state_dict_post_hook(_dense_keys_out)
        home.register_load_state_dict_pre_hook(_dense_keys_in)
    if linear.slices is None:
        parametrize.register_parametrization(home, linear.fused, slices)
    if linear.step is not None:
        kind = type(home).__name__.removeprefix("Parametrized")
        raise ValueError(
            f"{linear.fused} of a {kind} has a {type(linear.step).__name__} already, and a part of a "
            f"parameter has one parametrization at most; leave one of the two modifiers out"
        )
    assert linear.slices is not None
    linear.slices.get_submodule("steps").add_module(linear.key, step)


@torch.no_grad()
def remove_step(linear: WeightSlice, leave_parametrized: bool) -> None:
    """Remove the step of a slice; ``leave_parametrized``: the weight keeps the value that the step gave it."""
    assert linear.slices is not None
    if leave_parametrized:
        linear.slice_of(linear.whole).copy_(linear.weight)
    del linear.slices.get_submodule("steps")._modules[linear.key]


def has_steps(home: nn.Module) -> bool:
    """Whether a slice of a parameter of this module passes through a step."""
    lists = home._modules.get("parametrizations")
    return lists is not None and any(
        len(part.get_submodule("steps")._modules) > 0
        for parts in lists.children()
        for part in parts.children()
        if "steps" in part._modules
    )


def restore_home(home: nn.Module) -> None:
    """Make the parametrized parameters ordinary ones again, the same objects."""
    lists = home.get_submodule("parametrizations")
    originals = {name: parts.get_parameter("original") for name, parts in lists.named_children()}
    home._parameters = {name: originals.get(name, home._parameters.get(name)) for name in home.__dict__.pop(_ORDER)}
    del home._modules["parametrizations"]
    home.__class__ = type(home).__bases__[0]
    for hooks, function in (
        (home._state_dict_hooks, _dense_keys_out),
        (home._load_state_dict_pre_hooks, _dense_keys_in),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
            del hooks[key]


def _dense_keys_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Save the fused tensors under their own names, in the order of the dense module, and nothing else."""
    start = f"{prefix}parametrizations."
    for name, _ in module.get_submodule("parametrizations").named_children():
        if f"{start}{name}.original" in state_dict:
            state_dict[prefix + name] = state_dict.pop(f"{start}{name}.original")
    for key in [key for key in state_dict if key.startswith(start)]:
        del state_dict[key]
    names = [prefix + name for name in module.__dict__[_ORDER]]
    later = [key for key in state_dict if key.startswith(prefix) and key not in names]
    for key in (*(name for name in names if name in state_dict), *later):
        state_dict[key] = state_dict.pop(key)
    metadata = getattr(state_dict, "_metadata", {})
    for key in [key for key in metadata if key.startswith(start.removesuffix("."))]:
        del metadata[key]


def _dense_keys_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Load dense tensors; parameters of steps stay as they are."""
    lists = module.get_submodule("parametrizations")
    for name, _ in lists.named_children():
        if prefix + name in state_dict:
            state_dict[f"{prefix}parametrizations.{name}.original"] = state_dict.pop(prefix + name)
    for key, parameter in lists.named_parameters():
        if not key.endswith(".original"):
            state_dict.setdefault(f"{prefix}parametrizations.{key}", parameter.detach())
