"""Logits that are never whole: the layer that makes them runs on some tokens at a time, and again in the backward pass.

Of a large vocabulary the logits of a batch, their softmax and their gradients take more memory than all else in tuning.
Where a model returns what its last Linear gave, that layer is left out of the forward pass, and runs afterwards on
pieces of its input.

Shapes: N tokens, D features, V classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.layers.forward import patched
from lightning_compress.modifiers.distillation.divergence import tokens_at_once

__all__ = ["Call", "Head", "by_pieces"]


class Call:
    """What a Linear returned, to find out whether a model returns it unchanged.

    Args:
        module: The layer.
        output: Its output.
    """

    def __init__(self, module: nn.Linear, output: Tensor):
        self.module, self.output, self.version = module, output, output._version

    def gave(self, logits: Tensor) -> bool:
        """Whether these logits are that output, and were not written to since."""
        return _same(logits, self.output) and logits._version == self.version


class Head:
    """The Linear whose output a model returns as its logits.

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Linear):
        self.module, self.run = module, module.forward

    def input_of(self, run: Callable[[], Any], logits_of: Callable[[Any], Tensor]) -> Tensor | None:
        """The input of the layer when ``run`` runs the model, which gets zeros of no size in memory from the layer.

        Hooks on its inputs run; :attr:`run` is the layer without them.

        Args:
            run: Returns the output of the model.
            logits_of: The logits in it.

        Returns:
            None where the model has returned something else than those zeros.
        """
        calls: list[tuple[Tensor, Tensor]] = []

        def empty(x: Tensor) -> Tensor:
            calls.append((x, x.new_zeros(()).expand(*x.shape[:-1], self.module.out_features)))
            return calls[-1][1]

        self.run = self.module.forward
        with patched(self.module, forward=empty):
            logits = logits_of(run())
        return calls[-1][0] if calls and _same(logits, calls[-1][1]) else None


def by_pieces(function: Callable[..., Tensor], classes: int, *tensors: Tensor) -> Tensor:
    """A function of each token, on some tokens at a time; nothing that it computes is stored for the backward pass.

    Args:
        function: From tensors [n, ...] to one [n, ...].
        classes: V: the more classes, the fewer tokens.
        tensors: [N, ...].
    """
    n = tokens_at_once(classes, tensors[0].device)
    pieces: Any = zip(*(tensor.split(n) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


def _same(one: Tensor, other: Tensor) -> bool:
    views = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return views[0] == views[1]
