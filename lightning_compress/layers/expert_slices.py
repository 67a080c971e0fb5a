"""Parametrized weights of experts that lie in one tensor: a step for each projection of each expert.

    fused [E, F, C]  ->  steps[expert, rows](fused[expert, rows])  ->  joined again, [E, F, C]

The fused tensor stays the only parameter, under its own name in every state dict. Its module computes the joined tensor
once per call and runs its own code; where the input of an expert has a hook it runs expert by expert. Meanwhile the
children that layers/split_experts.py made are set aside: no other modifier finds them in the model.

Shapes: E experts, F rows of the fused tensor, R rows and C columns of one projection.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.home_parametrization import add_step, has_steps, remove_step, restore_home
from lightning_compress.layers.sharded import is_dtensor
from lightning_compress.layers.split_experts import ASIDE, give_children, linears_of, routed, take_children

__all__ = ["put_on_expert", "restore_experts", "set_aside", "take_off_expert"]


class ExpertSlices(nn.Module):
    """The parametrization of a fused tensor.

    Args:
        sizes: Rows of each projection of an expert, in order.
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.steps = nn.ModuleDict()  # by ExpertLinear.key

    def forward(self, fused: Tensor) -> Tensor:
        if is_dtensor(fused):  # between forward passes
            return fused
        pieces = list(self.pieces(fused).values())
        count = len(self.sizes)
        return torch.stack([torch.cat(pieces[i : i + count]) for i in range(0, len(pieces), count)])

    def pieces(self, fused: Tensor) -> dict[str, Tensor]:
        """The value of each projection, [R, C], in order; without a step as it is."""
        values = {}
        for expert, whole_FC in enumerate(fused.unbind(0)):  # one gradient for all; slices would have one each
            row = 0
            for piece_RC in whole_FC.split(self.sizes):
                key = f"{expert}_{row}"
                values[key] = self.steps[key](piece_RC) if key in self.steps else piece_RC
                row += len(piece_RC)
        return values


def put_on_expert(linear: ExpertLinear, step: nn.Module) -> None:
    """Let the weight of an expert pass through a step; at the first one its children are set aside."""
    home = linear.home
    if ASIDE not in home.__dict__:
        home.__dict__[ASIDE] = take_children(home)
        home.forward = MethodType(_forward, home)
    pieces = linear.whole.shape[1] // linear.out_features
    add_step(linear, ExpertSlices([linear.out_features] * pieces), step)


def take_off_expert(linear: ExpertLinear, leave_parametrized: bool) -> None:
    """Remove the step of an expert, and with the last one of its module the parametrizations: the children come back.

    ``leave_parametrized``: the weight keeps the value that the step gave it.
    """
    remove_step(linear, leave_parametrized)
    home = linear.home
    if not has_steps(home):
        children = home.__dict__[ASIDE]
        restore_experts(home)
        give_children(home, children)


def restore_experts(home: nn.Module) -> None:
    """Make the fused tensors ordinary parameters again, the same objects; the children stay away."""
    restore_home(home)
    del home.__dict__[ASIDE], home.__dict__["forward"]


def set_aside(module: nn.Module) -> list[ExpertLinear]:
    """The projections of a module whose children are set aside."""
    return [linear for child in module.__dict__.get(ASIDE, ()) for linear in linears_of(child)]


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    linears = set_aside(self)
    if not any(linear._forward_pre_hooks for linear in linears):
        with parametrize.cached():
            native: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
            return native
    with _in_pieces(linears):
        return routed(self, self.__dict__[ASIDE], hidden_states, top_k_index, top_k_weights)


@contextmanager
def _in_pieces(linears: list[ExpertLinear]) -> Iterator[None]:
    """Inside, each projection holds its value, all of one tensor computed together."""
    pieces: dict[str, dict[str, Tensor]] = {}
    for linear in linears:
        if linear.slices is not None and linear.fused not in pieces:
            pieces[linear.fused] = linear.slices.pieces(linear.whole)  # type: ignore[operator]
    try:
        for linear in linears:
            linear.value = pieces.get(linear.fused, {}).get(linear.key)
        yield
    finally:
        for linear in linears:
            linear.value = None
