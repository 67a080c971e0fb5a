"""Sparsities by the loss: layers whose errors raise it less lose more weights.

    F_rc = E[(dL/dW_rc)^2] ~ 1/R sum_t |dL/dy_t|^2 x_tc^2            the diagonal of Fisher's matrix, averaged over rows
    min  sum over pruned weights of F_rc W_rc^2                      as many zeros in all as with equal shares,
    over s_l in [s - lambda, s + lambda]                             each row of a layer l loses the share s_l

The costs of a layer's columns rise once each row is sorted: so the cheapest columns of all layers are the solution.

Shapes: N tokens, R rows, C columns, P partitions of a grouped convolution.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core import Modifier
from lightning_compress.layers.expert import mark_tokens, tokens_of
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows, partitions
from lightning_compress.layerwise.token_weights import energies, tapped
from lightning_compress.quant.observers import MeanSquare
from lightning_compress.team import Team

__all__ = ["LossSurvey", "cheapest"]


def cheapest(costs: Mapping[str, Tensor], rows: Mapping[str, int], sparsity: float, lmbda: float) -> dict[str, float]:
    """The sparsity of every layer.

    Args:
        costs: For each layer the rise of the loss with each further column that all rows lose, rising, float64 [C].
        rows: R of each layer.
        sparsity: s, of all layers together, up to one column of one layer.
        lmbda: lambda.
    """
    limits = {}
    for name, cost_C in costs.items():
        C = len(cost_C)
        low = min(math.ceil(max(0.0, sparsity - lmbda) * C - 1e-9), math.floor(sparsity * C + 1e-9))
        limits[name] = low, max(low, math.floor((sparsity + lmbda) * C + 1e-9))
    counts = {name: low for name, (low, _) in limits.items()}
    free = sum(sparsity * len(costs[name]) * rows[name] - low * rows[name] for name, low in counts.items())
    order = sorted(
        (float(cost) / rows[name], number, rows[name], name)
        for number, (name, (low, high)) in enumerate(limits.items())
        for cost in costs[name][low:high].tolist()
    )
    for _, _, size, name in order:
        if size > free:
            break
        counts[name], free = counts[name] + 1, free - size
    return {name: count / len(costs[name]) for name, count in counts.items()}


class LossSurvey:
    """What the gradients of a survey say of each layer, and the sparsities that follow.

    Args:
        modules: The targets by dotted name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = dict(modules)
        self._squares: dict[str, MeanSquare] = {}  # of inputs times norms of gradients
        self._costs: dict[str, Tensor] = {}
        self._summed = False  # over ranks, by an earlier run

    def watch(self, modifier: Modifier) -> None:
        """Let the backward passes of a survey give their gradients to this object."""
        for name, module in self.modules.items():
            modifier.hook(module, partial(self._forward, modifier, name), "forward")

    def _forward(self, modifier: Modifier, name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if name in self._costs or not (args and isinstance(output, Tensor) and torch.is_grad_enabled()):
            return None
        take = partial(self._take, name, module, modifier.token_mask, tokens_of(args[0]))
        return tapped(output, args[0], take)

    def _take(
        self, name: str, module: nn.Module, mask: Tensor | None, tokens: Tensor | None, x: Tensor, gradient: Tensor
    ) -> None:
        if tokens is not None:  # of an expert
            mask = None if mask is None else mask.flatten()[tokens.to(mask.device)]
            x = mark_tokens(x, torch.arange(len(tokens), device=x.device))
        X_PNC, w_N = inputs_as_rows(module, x, mask), energies(module, gradient, mask)
        if len(w_N) == X_PNC.shape[1]:
            self._square_of(name).update(X_PNC.float() * w_N.sqrt()[:, None])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of every layer, before any is closed."""
        return {f"fisher.{name}": one.sum_PC for name, one in self._squares.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums over ranks of what :meth:`state_dict` returned; the same on each."""
        self._summed = True
        for key, value in state.items():
            if key.startswith("fisher."):
                one = self._square_of(key.removeprefix("fisher."))
                one.sum_PC, one.tokens = value, 1

    def close(self, layer: str, names: Sequence[str], team: Team = Team()) -> None:  # noqa: B008  (frozen)
        """These targets have seen all their inputs."""
        for name in names:
            if not self._summed:
                team.reduce_(self._square_of(name))
            if self._square_of(name).tokens:
                self._costs[name] = self._cost(name)

    def sparsities(self, sparsity: float, lmbda: float) -> dict[str, float]:
        """The sparsity of every target that has seen data."""
        return cheapest(
            self._costs, {name: len(as_matrix(self.modules[name])) for name in self._costs}, sparsity, lmbda
        )

    def _square_of(self, name: str) -> MeanSquare:
        module = self.modules[name]
        return self._squares.setdefault(name, MeanSquare(partitions(module), as_matrix(module).shape[1]))

    def _cost(self, name: str) -> Tensor:
        sum_PC = self._squares.pop(name).sum_PC.float()
        W_RC = as_matrix(self.modules[name]).float()
        parts = zip(W_RC.chunk(len(sum_PC)), sum_PC.to(W_RC.device), strict=True)
        loss_RC = torch.cat([W.square() * sum_C for W, sum_C in parts]) / len(W_RC)
        return loss_RC.sort(dim=1).values.sum(0, dtype=torch.float64).cpu()
