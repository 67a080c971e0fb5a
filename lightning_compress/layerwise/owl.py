"""OWL: layers with many outliers keep more weights (Yin et al., 2023, arXiv:2310.05175).

    a_rc = |W_rc| * rms(x_c)                 Wanda's score, of the dense model
    D_l  = share of a in layer l that exceeds M times the mean of a in l
    s_l  = s - (D_l - mean D) * 2 lambda / (max D - min D)

A layer is a block of the model, all its targets together; a target outside of all blocks is one by itself. The mean of
D is weighed by the number of weights, so that the whole model has exactly the sparsity s that was asked for.

Shapes: N tokens, R rows, C columns, P partitions of a grouped convolution.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.layers.matrix import as_matrix, partitions
from lightning_compress.layers.sharded import full
from lightning_compress.quant.observers import MeanSquare
from lightning_compress.team import Team

__all__ = ["OutlierSurvey", "allocate", "outlier_share"]


def outlier_share(scores: Sequence[Tensor], m: float) -> float:
    """D of a layer: the share of all its scores that exceeds ``m`` times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > m * mean).sum()) for score in scores) / count


def allocate(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, lmbda: float) -> dict[str, float]:
    """The sparsity s_l of every layer.

    Args:
        shares: D of each layer.
        sizes: Number of weights of each layer.
        sparsity: s, of all layers together.
        lmbda: Layers differ by at most ``2 * lmbda``.
    """
    low, high = min(shares.values()), max(shares.values())
    mean = sum(shares[layer] * sizes[layer] for layer in shares) / sum(sizes[layer] for layer in shares)
    step = 2 * lmbda / (high - low) if high > low else 0.0
    return {layer: sparsity - (share - mean) * step for layer, share in shares.items()}


class OutlierSurvey:
    """Statistics of the inputs of the dense targets, and their sparsities.

    Args:
        modules: The targets by dotted name.
        m: M.
    """

    def __init__(self, modules: Mapping[str, nn.Module], m: float):
        self.modules, self.m = dict(modules), m
        self._squares: dict[str, MeanSquare] = {}
        self._layer: dict[str, str] = {}  # target -> its layer
        self._shares: dict[str, float] = {}
        self._summed = False  # over ranks, by an earlier run

    def observe(self, name: str, X_PNC: Tensor) -> None:
        """Add one input of a target, [P, N, C]."""
        self._square_of(name).update(X_PNC)

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and tokens of every target, before any is closed."""
        tokens = {
            f"tokens.{name}": torch.tensor(one.tokens, dtype=torch.int64, device="cpu")
            for name, one in self._squares.items()
        }
        return tokens | {f"squares.{name}": one.sum_PC for name, one in self._squares.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums over ranks of what :meth:`state_dict` returned; the same on each."""
        self._summed = True
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "tokens":
                self._square_of(name).tokens = int(value)
            elif kind == "squares":
                self._square_of(name).sum_PC = value

    def close(self, layer: str, names: Sequence[str], team: Team = Team()) -> None:  # noqa: B008  (frozen)
        """These targets are a layer, and have seen all their inputs; an empty name: each by itself."""
        for name in names:
            if not self._summed:
                team.reduce_(self._square_of(name))
        seen = [name for name in names if self._squares[name].tokens]
        for group, members in {layer: seen}.items() if layer else {name: [name] for name in seen}.items():
            if members:
                self._shares[group] = outlier_share([self._score(name) for name in members], self.m)
                self._layer |= dict.fromkeys(members, group)

    def sparsities(self, sparsity: float, lmbda: float) -> dict[str, float]:
        """The sparsity of every target that has seen data."""
        sizes: dict[str, int] = {}
        for name, layer in self._layer.items():
            sizes[layer] = sizes.get(layer, 0) + as_matrix(self.modules[name]).numel()
        by_layer = allocate(self._shares, sizes, sparsity, lmbda) if sizes else {}
        return {name: by_layer[layer] for name, layer in self._layer.items()}

    def _square_of(self, name: str) -> MeanSquare:
        module = self.modules[name]
        return self._squares.setdefault(name, MeanSquare(partitions(module), as_matrix(module).shape[1]))

    def _score(self, name: str) -> Tensor:
        rms_PC = self._squares.pop(name).value().sqrt()
        W_RC = full(as_matrix(self.modules[name])).float().abs()
        return torch.cat([W * rms for W, rms in zip(W_RC.chunk(len(rms_PC)), rms_PC, strict=True)])
