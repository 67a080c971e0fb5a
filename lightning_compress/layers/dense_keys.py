"""A parametrized weight that is saved and loaded as a plain one: the dense weight under its own name, nothing else.

Other parameters of a parametrization (learned scales, logits of masks) are for the optimizer; the modifier that put the
parametrization on keeps them in its own state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.expert_slices import put_on_expert, restore_experts, set_aside, take_off_expert
from lightning_compress.layers.module_weights import (
    HOMES,
    ModuleWeight,
    put_on_weight,
    restore_weights,
    take_off_weight,
    weights_inside,
)
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = ["ORIGINAL", "inactive", "original_weight", "parametrization_of", "parts_of", "put_on", "remove_hook",
           "take_off", "unparametrize"]  # fmt: skip

ORIGINAL, PARTS = "parametrizations.weight.original", "parametrizations.weight."
P = TypeVar("P", bound=nn.Module)


def put_on(module: nn.Module, parametrization: nn.Module) -> None:
    """Let the weight of a module pass through a parametrization, after existing ones; a slice has one at most."""
    if isinstance(module, ExpertLinear):
        return put_on_expert(module, parametrization)
    if isinstance(module, ModuleWeight):
        return put_on_weight(module, parametrization)
    parametrize.register_parametrization(module, "weight", parametrization)
    module.register_state_dict_post_hook(_dense_keys_out)
    module.register_load_state_dict_pre_hook(_dense_keys_in)


def parametrization_of(module: nn.Module, kind: type[P]) -> P | None:
    """The parametrization of that class on a module's weight, or None."""
    if isinstance(module, WeightSlice):
        return module.step if isinstance(module.step, kind) else None
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict) or "weight" not in lists:
        return None
    return next((p for p in lists["weight"].children() if isinstance(p, kind)), None)


def original_weight(module: nn.Module) -> Tensor:
    """The dense weight of a parametrized module, without gradient."""
    if isinstance(module, WeightSlice):
        return module.slice_of(module.whole).detach()
    return module.get_parameter(ORIGINAL).detach()


@contextmanager
def inactive(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with its dense weights: parametrizations that are ``active`` let them pass."""
    parametrizations = [module for module in model.modules() if getattr(module, "active", None) is True]
    for parametrization in parametrizations:
        parametrization.active = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for parametrization in parametrizations:
            parametrization.active = True  # type: ignore[assignment]


@torch.no_grad()
def take_off(module: nn.Module, kind: type[nn.Module], leave_parametrized: bool) -> None:
    """Remove a parametrization, and with the last one the hooks.

    Args:
        module: The parametrized module.
        kind: Class of the parametrization.
        leave_parametrized: True: all parametrizations come off, and the weight keeps the value that they gave it.
            False: only this one does, and the weight keeps the value that it was made from.
    """
    if isinstance(module, ExpertLinear):
        return take_off_expert(module, leave_parametrized)
    if isinstance(module, ModuleWeight):
        return take_off_weight(module, leave_parametrized)
    steps = module.get_submodule("parametrizations.weight")
    if not leave_parametrized and sum(1 for _ in steps.children()) > 1:
        assert isinstance(steps, nn.ModuleList)
        del steps[next(i for i, step in enumerate(steps) if isinstance(step, kind))]
        return
    parametrize.remove_parametrizations(module, "weight", leave_parametrized)
    for name in [name for name in module._parameters if name != "weight"]:
        module._parameters[name] = module._parameters.pop(name)  # the weight comes first, as before
    # by identity: handles would not survive copy.deepcopy of the model
    for hooks, function in (
        (module._state_dict_hooks, _dense_keys_out),
        (module._load_state_dict_pre_hooks, _dense_keys_in),
    ):
        remove_hook(hooks, function)


def unparametrize(module: nn.Module) -> None:
    """Make the dense weight an ordinary parameter again, the same object.

    Not by ``remove_parametrizations``: registering anew calls ``set_`` on the parameter, and its gradient then no
    longer reaches the hooks that DDP has put on it.
    """
    if set_aside(module):
        return restore_experts(module)
    if isinstance(module, HOMES):
        return restore_weights(module)
    module._parameters = {"weight": module.get_parameter(ORIGINAL), **module._parameters}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]


def parts_of(owner: nn.Module) -> list[nn.Module]:
    """The layers whose weights lie in the parameters of a module: its slices, or the module itself."""
    return [*set_aside(owner), *weights_inside(owner).values()] or [owner]


def remove_hook(hooks: dict[int, Any], function: Any) -> None:
    """Remove a function from one of the tables of hooks of a module."""
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
        del hooks[key]


def _dense_keys_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Save the dense weight under its own name, and nothing else."""
    if prefix + ORIGINAL in state_dict:
        later = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        state_dict[prefix + "weight"] = state_dict.pop(prefix + ORIGINAL)
        for key in later:  # in the order of the dense module
            state_dict[key] = state_dict.pop(key)
    for key in [key for key in state_dict if key.startswith(prefix + PARTS)]:
        del state_dict[key]
    metadata = getattr(state_dict, "_metadata", {})
    for key in [key for key in metadata if key.startswith(prefix + "parametrizations")]:
        del metadata[key]


def _dense_keys_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a dense weight; other parameters stay as they are."""
    if prefix + "weight" in state_dict:
        state_dict[prefix + ORIGINAL] = state_dict.pop(prefix + "weight")
    for name, parameter in module.get_submodule("parametrizations.weight").named_parameters():
        if name != "original":
            state_dict.setdefault(prefix + PARTS + name, parameter.detach())
