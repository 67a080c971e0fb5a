"""Follow one run of a model and note which dimensions of which parameters share a basis.

Every tensor that is made carries a mark: the :class:`Space` of its last dimension,
the normalization that it has just passed, and whether it is a value on its way through an attention. Operations that
treat all vectors of a basis alike (views of other dimensions, sums of two vectors, products with a number per token)
hand the mark on; all others need the basis as it is, and the space remembers the first of them. Linear maps by a
parameter end one space and begin another. No table of architectures, no tracing: torch functions are watched as they
run, so the spaces are those of the run that was made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.modifiers.rotation.basis_tracer import Linear, Watcher
from lightning_compress.modifiers.rotation.norms import recognize
from lightning_compress.modifiers.rotation.spaces import Head, Norm, Space

__all__ = ["Followed", "follow"]


@dataclass
class Followed:
    """What a run showed.

    Args:
        spaces: Each once.
        heads: Values of attentions.
        attentions: How many attentions ran.
        linears: All products with a parameter, in order.
        touched: Parameters that the run used, by ``id``.
    """

    spaces: list[Space]
    heads: list[Head]
    attentions: int
    linears: list[Linear]
    touched: set[int]


def follow(model: nn.Module, run: Callable[[], Any]) -> Followed:
    """Run the model once, in eval mode and without gradients, and say who shares which basis.

    Args:
        model: Its parameters are looked at, never changed.
        run: Calls it once.
    """
    watcher = Watcher(model)
    with torch.no_grad(), _eager_experts(model), _module_hooks(model, watcher), watcher:
        output = run()
    logits = getattr(output, "logits", None)
    given = [logits] if isinstance(logits, Tensor) else dict(output) if hasattr(output, "keys") else output
    for leaf in tree_leaves(given):
        watcher.need(leaf, "the model gives out a vector of it")
    roots = dict.fromkeys(id(space.root()) for space in watcher.spaces)
    by_id = {id(space.root()): space.root() for space in watcher.spaces}
    return Followed(
        [by_id[key] for key in roots], watcher.heads, watcher.attentions, watcher.linears, set(watcher.touched)
    )


# -- while it runs ----------------------------------------------------------------------------------------------------


@contextmanager
def _module_hooks(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Which module runs; normalizations are seen as one operation."""
    recognized: dict[tuple[str, int], Norm | None] = {}

    def norm_of(name: str, module: nn.Module, args: tuple[Any, ...]) -> Norm | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].ndim or any(module.children()):
            return None
        key = (name, args[0].shape[-1])
        if key not in recognized:
            watcher.asleep += 1
            recognized[key] = None  # its own call from here is not looked at
            try:
                recognized[key] = recognize(name, module, args[0].shape[-1], args[0].device)
            finally:
                watcher.asleep -= 1
        return recognized[key]

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not watcher.asleep:
            if norm_of(name, module, args) is not None:
                watcher.asleep += 1
            watcher.inside.append(name)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        norm = norm_of(name, module, args) if watcher.inside and watcher.inside[-1] == name else None
        if norm is not None:
            watcher.asleep -= 1
            watcher.norm(norm, args[0], out)
        if not watcher.asleep:
            watcher.inside.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):  # watched, it would run in place of the fused tensor
            continue
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: enter(name, m, args), prepend=True))
        handles.append(module.register_forward_hook(lambda m, args, out, name=name: leave(name, m, args, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of transformers: one product per expert, in the open, instead of one for all."""
    key = "_experts_implementation_internal"
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, key, None) is not None and not any(c is config for c, _ in before):
            before.append((config, getattr(config, key)))
    for config, _ in before:
        setattr(config, key, "eager")
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, key, value)
