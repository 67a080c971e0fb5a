"""Modules among the hyperparameters of a checkpoint: stored as the dense modules that they were.

``self.save_hyperparameters()`` with the network among the arguments makes Lightning pickle it with every checkpoint:
the object that carries hooks, parametrizations and records. Most of them cannot be pickled, and none can be read where
this package is not installed.
"""

import copy
from collections import OrderedDict
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.layers.dense_keys import unparametrize
from lightning_compress.layers.module_weights import remove_weights, weights_inside
from lightning_compress.layers.split_experts import is_split, unsplit
from lightning_compress.structure.surgery import Structure

__all__ = ["plain_copy", "write_plain_modules"]

PACKAGE = __name__.partition(".")[0]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def write_plain_modules(checkpoint: dict[str, Any]) -> None:
    """Replace each module in the hyperparameters that carries something of this package by a copy without it."""
    key = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    memo: dict[int, Any] = {}
    if key in checkpoint:
        plain = tree_map_only(nn.Module, lambda m: plain_copy(m, memo) if _is_marked(m) else m, checkpoint[key])
        checkpoint[key] = plain


def plain_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy without hooks, parametrizations and records of this package; parameters and buffers are the same tensors.

    Args:
        module: The module; it is not changed.
        memo: As in :func:`copy.deepcopy`; with one for several modules, what they share stays shared.
    """
    memo = {} if memo is None else memo
    for inner in module.modules():
        attributes = vars(inner)
        memo.update({id(leaf): leaf for leaf in tree_leaves(list(attributes.values())) if isinstance(leaf, Tensor)})
        memo.update({id(value): value for name, value in attributes.items() if _is_record(name)})
        for table in HOOKS:  # before copying: a hook may hold a modifier, with its statistics
            hooks = attributes[table]
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_ours(hook))
    copied = copy.deepcopy(module, memo)
    for inner in list(copied.modules()):
        if is_split(inner):
            unsplit(inner)
        if weights_inside(inner):
            remove_weights(inner)
        if (parts := _parametrizations(inner)) and all(_is_ours(type(part)) for part in parts):
            unparametrize(inner)  # with one of another package torch refuses to pickle the module anyway
        for name in [name for name in vars(inner) if _is_record(name) and name != Structure.attribute]:
            delattr(inner, name)  # but for the cuts, which are plain data
    return copied


def _is_marked(module: nn.Module) -> bool:
    return any(
        any(_is_record(name) for name in vars(inner))
        or any(_is_ours(hook) for table in HOOKS for hook in vars(inner)[table].values())
        or any(_is_ours(type(part)) for part in _parametrizations(inner))
        or is_split(inner)
        or bool(weights_inside(inner))
        for inner in module.modules()
    )


def _is_record(name: str) -> bool:
    return name.startswith(f"_{PACKAGE}_")


def _is_ours(thing: Any) -> bool:
    """Whether a class, a function, or a function that torch has wrapped, is defined in this package."""
    thing = getattr(thing, "hook", thing)
    return str(getattr(thing, "__module__", "")).partition(".")[0] == PACKAGE


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    lists = module._modules.get("parametrizations")
    return [] if lists is None else [part for parts in lists.children() for part in parts.children()]
