"""Follow one run of a model and record which dimensions of which parameters share a basis.

Every tensor of the run carries a mark: the :class:`Space` of its last dimension, the normalization that it has just
passed, and whether it is a value on its way through an attention. Linear maps by a parameter end one space and begin
another; operations that need a basis as it is fix the space, which records the first of them. There is no table of
architectures and no tracing: torch functions are watched as they run, so the spaces are those of this run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.modifiers.rotation.basis_tracer import BasisTracer
from lightning_compress.modifiers.rotation.marks import Product
from lightning_compress.modifiers.rotation.norms import recognize
from lightning_compress.modifiers.rotation.spaces import Head, Norm, Space

__all__ = ["BasisTrace", "follow", "output_leaves"]


@dataclass
class BasisTrace:
    """Spaces, heads and products of a run.

    Args:
        spaces: All spaces, each once.
        heads: Values of attentions, and the weights that read them.
        attentions: Number of attentions that ran.
        products: All products with a parameter, in order.
        touched: Parameters that the run used, by ``id``.
    """

    spaces: list[Space]
    heads: list[Head]
    attentions: int
    products: list[Product]
    touched: set[int]


def follow(model: nn.Module, run: Callable[[], Any]) -> BasisTrace:
    """Run the model once, in eval mode and without gradients, and record its spaces.

    Args:
        model: Model whose parameters are read and not changed.
        run: Calls the model once.
    """
    tracer = BasisTracer(model)
    with torch.no_grad(), _eager_experts(model), _module_hooks(model, tracer), tracer:
        output = run()
    marks = tracer.marks
    for leaf in output_leaves(output):
        marks.need(leaf, "the model returns a vector of it")
    roots = {id(space.root()): space.root() for space in marks.spaces}
    return BasisTrace(list(roots.values()), marks.heads, marks.attentions, marks.products, marks.touched)


def output_leaves(output: Any) -> list[Any]:
    """The logits of an output that has them, else all its leaves."""
    logits = getattr(output, "logits", None)
    return tree_leaves([logits] if isinstance(logits, Tensor) else dict(output) if hasattr(output, "keys") else output)


# -- the run ----------------------------------------------------------------------------------------------------------


@contextmanager
def _module_hooks(model: nn.Module, tracer: BasisTracer) -> Iterator[None]:
    """Record which module runs, and normalizations as one operation."""
    recognized: dict[tuple[str, int], Norm | None] = {}

    def norm_of(name: str, module: nn.Module, args: tuple[Any, ...]) -> Norm | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].ndim or any(module.children()):
            return None
        key = (name, args[0].shape[-1])
        if key not in recognized:
            tracer.asleep += 1
            recognized[key] = None  # for the call that recognize makes
            try:
                recognized[key] = recognize(name, module, args[0].shape[-1], args[0].device)
            finally:
                tracer.asleep -= 1
        return recognized[key]

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not tracer.asleep:
            if norm_of(name, module, args) is not None:
                tracer.asleep += 1
            tracer.marks.inside.append(name)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        norm = norm_of(name, module, args) if tracer.marks.inside and tracer.marks.inside[-1] == name else None
        if norm is not None:
            tracer.asleep -= 1
            tracer.marks.normalize(norm, args[0], out)
        if not tracer.asleep:
            tracer.marks.inside.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):  # with a hook it would run instead of the fused tensor
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
    """Mixtures of transformers run one product for each expert, instead of one for all."""
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
