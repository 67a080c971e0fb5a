"""What the loss gains by an error in the weight of a layer, estimated from the gradients of the dense model.

    y_t = W x_t,  g_t = dL / dy_t         of a token, labels drawn from the model (calibration/gradient_survey.py)
    dL ~ 1/2 sum_t (g_t^T E x_t)^2        E = W - Q: Fisher's matrix in place of the Hessian, tokens independent
       ~ 1/2 sum_rc F_rc E_rc^2           errors of weights independent, F_rc = sum_t g_tr^2 x_tc^2

F is stored for pieces of k = 32 columns, and inside of a piece spread as sum_t |g_t|^2 x_tc^2 is. E is that of
rounding to nearest, with scales searched under these weights.

Shapes: N tokens (places of a convolution's window), R rows, C columns, K pieces of columns, P partitions.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_compress.core import Modifier
from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.matrix import CONVOLUTIONS, as_matrix, inputs_as_rows, only_input, partitions
from lightning_compress.layerwise.token_weights import tapped
from lightning_compress.modifiers.allocate.options import Group
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.rounding import find_scales
from lightning_compress.team import Team

__all__ = ["Fisher", "Sensitivities", "predicted_loss"]

PIECE = 32  # columns


class Fisher:
    """Sums of F over tokens, float64, so that ranks change no bit."""

    reduce = {"sum_RK": "sum", "sum_PC": "sum", "tokens": "sum"}

    def __init__(self, rows: int, columns: int, partitions: int = 1):
        self.sum_RK = torch.zeros(rows, math.ceil(columns / PIECE), dtype=torch.float64, device="cpu")
        self.sum_PC = torch.zeros(partitions, columns, dtype=torch.float64, device="cpu")
        self.tokens = 0

    def update(self, X_PNC: Tensor, g_NR: Tensor) -> None:
        """Add the inputs and the gradients of the outputs of some tokens."""
        squares_PNC, g_PNR = X_PNC.float().square(), torch.stack(g_NR.float().square().chunk(len(X_PNC), dim=1))
        sum_RK = torch.bmm(g_PNR.mT, _pieces(squares_PNC).sum(3)).flatten(0, 1).double()
        sum_PC = torch.bmm(g_PNR.sum(2)[:, None], squares_PNC)[:, 0].double()
        self.sum_RK, self.sum_PC = self.sum_RK.to(sum_RK.device) + sum_RK, self.sum_PC.to(sum_PC.device) + sum_PC
        self.tokens += X_PNC.shape[1]

    def columns(self) -> Tensor:
        """The weight of each column, of all rows: float32 [C], 1 in the mean."""
        sum_C = self.sum_PC.sum(0)
        return (sum_C / sum_C.mean()).float() if float(sum_C.sum()) > 0 else torch.ones_like(sum_C).float()

    def value(self) -> Tensor:
        """F, float32 [R, C]."""
        P, C = self.sum_PC.shape
        spread_PKk = _pieces(self.sum_PC)
        spread_PKk = spread_PKk / spread_PKk.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        F_PRKk = self.sum_RK.unflatten(0, (P, -1))[..., None] * spread_PKk[:, None]
        return F_PRKk.flatten(2)[..., :C].flatten(0, 1).float()


def _pieces(values: Tensor) -> Tensor:
    """[..., C] as [..., K, k], zeros behind the last column."""
    return pad(values, (0, -values.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE))


def predicted_loss(W_RC: Tensor, F_RC: Tensor, columns_C: Tensor, scheme: QuantizationScheme | None) -> float:
    """What rounding the weight costs, in nats of all tokens; None: it stays dense."""
    if scheme is None:
        return 0.0
    scale, zero_point = find_scales(W_RC, scheme.weights, "hessian", columns_C)
    E_RC = (W_RC - round_weight(W_RC, scale, zero_point, scheme.weights)).float()
    return 0.5 * float((F_RC * E_RC.square()).sum(dtype=torch.float64))


class Sensitivities:
    """Fisher's matrix of layers, and what candidates cost.

    Args:
        layers: By dotted name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = dict(layers)
        self._summed = False  # over ranks, by an earlier run
        self._fisher: dict[str, Fisher] = {}
        for name, module in self.layers.items():
            R, C = as_matrix(module).shape
            self._fisher[name] = Fisher(R, C, partitions(module))

    def watch(self, modifier: Modifier) -> None:
        """Let the backward passes of a survey give their gradients to this object."""
        for name, module in self.layers.items():
            modifier.hook(module, partial(_check, name))  # also: split mixtures call experts that have such a hook
            modifier.hook(module, partial(self._forward, name), "forward")

    def _forward(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return None
        return tapped(output, args[0], partial(self._take, name, module))

    def _take(self, name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        self._fisher[name].update(inputs_as_rows(module, x), _outputs_as_rows(module, gradient))

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and tokens of every layer."""
        state: dict[str, Tensor] = {}
        for name, fisher in self._fisher.items():
            state[f"tokens.{name}"] = torch.tensor(fisher.tokens, dtype=torch.int64, device="cpu")
            state |= {f"sum_RK.{name}": fisher.sum_RK, f"sum_PC.{name}": fisher.sum_PC}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums over ranks of what :meth:`state_dict` returned; the same on each."""
        self._summed = True
        for key, value in state.items():
            field, _, name = key.partition(".")
            setattr(self._fisher[name], field, int(value) if field == "tokens" else value)

    def losses(self, groups: Sequence[Group], team: Team, what: str) -> list[list[float]]:
        """What each option of each group costs; ranks share the work."""
        for fisher in self._fisher.values() if not self._summed else ():
            team.reduce_(fisher)
        unseen = [group for group in groups if not any(self._fisher[name].tokens for name in group.modules)]
        if unseen:
            names = [repr(name) for group in unseen for name in group.modules]
            warnings.warn(
                f"{what}: no gradient of the calibration batches reached {shortlist(names)}; an error in their weights "
                f"counts as it does elsewhere in the mean",
                stacklevel=2,
            )
        mine = {i: self._of_group(groups[i], groups[i] in unseen) for i in team.mine(len(groups))}
        losses = {i: each for rank in team.gather(mine, what) for i, each in rank.items()}
        return [losses[i] for i in range(len(groups))]

    @torch.no_grad()
    def _of_group(self, group: Group, is_unseen: bool) -> list[float]:
        losses = [0.0] * len(group.schemes)
        for name, module in group.modules.items():
            fisher, W_RC = self._fisher[name], as_matrix(module)
            F_RC = torch.full_like(W_RC, self._mean, dtype=torch.float32) if is_unseen else fisher.value()
            F_RC, columns_C = F_RC.to(W_RC.device), fisher.columns().to(W_RC.device)
            for k, schemes in enumerate(group.schemes):
                losses[k] += predicted_loss(W_RC, F_RC, columns_C, schemes[name])
        return losses

    @cached_property
    def _mean(self) -> float:
        """The mean of F over the weights of all layers that were seen."""
        seen = [fisher for fisher in self._fisher.values() if fisher.tokens]
        weights = sum(len(fisher.sum_RK) * fisher.sum_PC.shape[1] for fisher in seen)
        return math.fsum(float(fisher.sum_RK.sum()) for fisher in seen) / max(1, weights)


def _check(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    only_input(name, args)


def _outputs_as_rows(module: nn.Module, y: Tensor) -> Tensor:
    """The gradient of an output as [N, R], tokens in the order of :func:`inputs_as_rows`."""
    if isinstance(module, CONVOLUTIONS):
        spatial = len(module.kernel_size)
        y = (y if y.ndim > spatial + 1 else y[None]).flatten(2).mT
    return y.reshape(-1, y.shape[-1])
