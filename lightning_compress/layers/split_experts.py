"""A fused mixture as modules: a Linear for each expert and projection, which hooks, solvers and packing work on.

transformers 5 holds the experts of a layer in two parameters, gate_up_proj [E, 2 I, H] and down_proj [E, H, I]. Here
the module that owns them gets a child for each expert,

    experts.0.gate_proj   rows [0, I) of gate_up_proj[0]        experts.0.down_proj   down_proj[0]
    experts.0.up_proj     rows [I, 2 I)                         experts.1.gate_proj   ...

that are views (layers/expert.py): no weight is copied and no parameter is added. The forward pass goes through the
children, expert after expert, as long as one of them has a hook or quantizes its input, and through the code of the
module otherwise.

Shapes: N tokens of a batch, K experts per token, E experts, H hidden, I inside of an expert.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers.expert import ExpertLinear, mark_tokens
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.module_weights import hide
from lightning_compress.layers.records import has_record

__all__ = [
    "ASIDE", "PROJECTIONS", "fused_experts", "give_children", "is_split", "join", "linears_of", "routed", "split",
    "split_while", "take_children", "unsplit", "watched",
]  # fmt: skip

ASIDE = "_lightning_compress_experts_aside"
"""Attribute of a module whose children are set aside, as layers/expert_slices.py does."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ALL, _COUNTS = "_lightning_compress_all_experts", "_lightning_compress_tokens_per_expert"


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with fused experts of the layout above, by dotted name; also where they are trained in slices."""
    fused = {name: module for name, module in model.named_modules() if _fault(module) == "" or ASIDE in vars(module)}
    return {clean_name(name): module for name, module in fused.items()}


def is_split(module: nn.Module) -> bool:
    """True for fused experts that have their children."""
    return isinstance(getattr(getattr(module, "0", None), "down_proj", None), ExpertLinear)


def split(model: nn.Module) -> list[str]:
    """Give fused experts their children; names of those that had none. A mixture of another layout gets a warning."""
    names = []
    for name, module in list(model.named_modules()):
        if (fault := _fault(module)) is None or is_split(module):
            continue
        if fault:
            warnings.warn(
                f"the experts of {clean_name(name)!r} ({type(module).__name__}) are left as they are: {fault}",
                stacklevel=3,
            )
            continue
        inner = module.get_parameter("down_proj").shape[2]
        for expert in range(_count(module)):
            child = nn.Module()
            child.gate_proj = ExpertLinear(module, "gate_up_proj", expert, (0, inner))
            child.up_proj = ExpertLinear(module, "gate_up_proj", expert, (inner, 2 * inner))
            child.down_proj = ExpertLinear(module, "down_proj", expert, (0, module.get_parameter("down_proj").shape[1]))
            module.add_module(str(expert), child.train(module.training))
        module.forward = MethodType(_forward, module)
        names.append(clean_name(name))
    return names


def join(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove the children again, of all fused experts or of those named, where no child carries a record.

    Those of other modules (layers/module_weights.py) go too, where they carry none.
    """
    hide(model)
    for name, module in list(model.named_modules()):
        if not is_split(module) or (names is not None and clean_name(name) not in names):
            continue
        if not any(has_record(linear) for linear in _linears(module)):
            unsplit(module)


def unsplit(module: nn.Module) -> None:
    """Remove the children of one module that :func:`is_split`, whatever they carry."""
    for expert in [name for name, _ in module.named_children() if name.isdigit()]:
        delattr(module, expert)
    del module.__dict__["forward"]


def take_children(module: nn.Module) -> list[nn.Module]:
    """Remove the children as :func:`unsplit` does; gives them in the order of the experts."""
    children = [child for name, child in module.named_children() if name.isdigit()]
    unsplit(module)
    return children


def give_children(module: nn.Module, children: Sequence[nn.Module]) -> None:
    """Put children in that :func:`take_children` removed, and let the forward pass go through them."""
    for expert, child in enumerate(children):
        module.add_module(str(expert), child.train(module.training))
    module.forward = MethodType(_forward, module)


@contextmanager
def split_while(model: nn.Module) -> Iterator[None]:
    """Inside, fused experts have their children; afterwards only those that are quantized keep them.

    Children that :func:`~lightning_compress.layers.module_weights.reveal` gives to other modules meanwhile go likewise.
    """
    names = split(model)
    try:
        yield
    finally:
        join(model, names)


@contextmanager
def watched(model: nn.Module, all_experts: bool = False) -> Iterator[None]:
    """Inside, tokens are counted; afterwards experts that the router sent none are named, in a warning.

    Args:
        model: A model whose fused experts have their children already.
        all_experts: Every expert with a hook gets every token, and there is no such warning. The output of the
            mixture is still the one that the router chooses.
    """
    mixtures = {clean_name(name): module for name, module in model.named_modules() if is_split(module)}
    for module in mixtures.values():
        setattr(module, _ALL, all_experts)
        setattr(module, _COUNTS, Counter())
    try:
        yield
    finally:
        counted = {name: module.__dict__.pop(_COUNTS) for name, module in mixtures.items()}
        for module in mixtures.values():
            delattr(module, _ALL)
    unseen = {
        name: [f"{expert}" for expert in range(_count(mixtures[name])) if not counts[expert]]
        for name, counts in counted.items()
        if counts and not all_experts
    }
    if unused := [f"{name} ({', '.join(experts)})" for name, experts in unseen.items() if experts]:
        warnings.warn(
            f"the router sent no calibration token to the experts of {'; '.join(unused)}: what needs data is only "
            f"rounded there, or left as it was; calibrate on more tokens, or set moe_calibrate_all_experts=True",
            stacklevel=3,
        )


def _fault(module: nn.Module) -> str | None:
    """Why fused experts cannot be split; empty where they can, None where a module has no fused experts."""
    parameters = dict(module.named_parameters(recurse=False))  # not _parameters: a scripted module has another kind
    down, both = parameters.get("down_proj"), parameters.get("gate_up_proj")
    if down is None or down.ndim != 3:
        return None
    if both is None:
        return "they have no gate_up_proj of gate and up in one tensor"
    if getattr(module, "has_bias", "gate_up_proj_bias" in parameters):
        return "they have biases"
    is_ordered = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    E, H, inner = down.shape
    if not is_ordered or both.shape != (E, 2 * inner, H) or not callable(getattr(module, "_apply_gate", None)):
        return "their weights lie transposed or interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "they have a norm behind each expert"
    return ""


def _count(module: nn.Module) -> int:
    return int(module.get_parameter("down_proj").shape[0])


def _linears(module: nn.Module) -> Iterator[ExpertLinear]:
    for child in module.children():
        yield from linears_of(child)


def linears_of(child: nn.Module) -> Iterator[ExpertLinear]:
    """The projections of one expert."""
    return (linear for linear in child.children() if isinstance(linear, ExpertLinear))


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The mixture's output [N, H]: sum over a token's experts of weight times the expert's output.

    An index of E or above in ``top_k_index`` [N, K] means no expert.
    """
    if not any(linear._forward_pre_hooks for linear in _linears(self)):
        native: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return native
    children = [getattr(self, str(expert)) for expert in range(_count(self))]
    return routed(self, children, hidden_states, top_k_index, top_k_weights)


def routed(
    module: Any, children: Sequence[nn.Module], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The mixture's output [N, H], expert after expert, by calls of their projections."""
    out_NH = torch.zeros_like(hidden_states)
    every = torch.arange(len(hidden_states), device=hidden_states.device)
    counts = module.__dict__.get(_COUNTS, Counter())
    for expert, child in enumerate(children):
        tokens, place = torch.where(top_k_index == expert)
        counts[expert] += len(tokens)
        sent = every if module.__dict__.get(_ALL) else tokens
        if not len(sent):
            continue
        y = _expert(module, child, hidden_states[sent], sent)
        y = y[tokens] if sent is every else y
        out_NH.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(out_NH.dtype))
    return out_NH


def _expert(module: Any, child: Any, x: Tensor, tokens: Tensor) -> Tensor:
    x = mark_tokens(x, tokens)
    hidden: Tensor = module._apply_gate(torch.cat([child.gate_proj(x), child.up_proj(x)], dim=-1))
    out: Tensor = child.down_proj(mark_tokens(hidden, tokens))
    return out
