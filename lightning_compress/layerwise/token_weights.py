"""How much the loss depends on each token of a layer's input: Hessians whose tokens are weighed by it.

    H = sum_t w_t x_t x_t^T / N,   w_t = sum over outputs of (dL / dy_t)^2, divided by its mean over tokens

With w = 1 the error of the layer's output is minimized, with these weights its first-order effect on the loss, as far
as tokens are independent (GuidedQuant, Kim et al. 2025, arXiv:2505.07004). Layers that receive one tensor have weights
from the outputs of all of them, and so one H still. A module around layers, whose output's error counts, has weights
from its output in the same way.

Shapes: N tokens (places of a convolution's window), C columns.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.core import Modifier
from lightning_compress.layers.matrix import CONVOLUTIONS, inputs_as_rows, is_embedding
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.layerwise.parent import counted, first_tensor
from lightning_compress.team import Team

__all__ = ["GRADIENTS", "UNSHARDED", "Objective", "TokenWeights", "energies", "tapped"]

Objective = Literal["layer", "loss", "output", "training_step"]
GRADIENTS: Mapping[str, Literal["classes", "values", "training_step"] | None] = MappingProxyType(
    {"layer": None, "loss": "classes", "output": "values", "training_step": "training_step"}
)
"""What a survey must give for each objective (``Needs.gradients``)."""
UNSHARDED = "it needs gradients of the whole model; use objective: layer, and as sparsity_profile at most owl"
"""Why sharded models are refused."""


class TokenWeights:
    """The weights of all tokens, of the layers' groups by input tensor.

    Args:
        layers: The layers by name. Single experts are left out: once blocks are compressed, other tokens reach them.
            So are embeddings, which have no inputs to weigh.
        parents: Modules around them whose outputs are weighed.
    """

    def __init__(self, layers: Mapping[str, nn.Module], parents: Mapping[str, nn.Module] = MappingProxyType({})):
        weighed = {name: not (isinstance(m, WeightSlice) or is_embedding(m)) for name, m in layers.items()}
        self.layers = {name: module for name, module in layers.items() if weighed[name]}
        self.parents = dict(parents)
        self.closed = False
        self._first: dict[str, str] = {}  # layer -> the first one that receives its input
        self._inputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # of the batch that runs
        self._weights: dict[tuple[str, int], Tensor] = {}  # by first layer and batch: of tokens that count, [N]

    def watch(self, modifier: Modifier) -> None:
        """Let the backward passes of a survey give their gradients to this object."""
        for name, module in self.layers.items():
            modifier.hook(module, partial(self._forward, modifier, name), "forward")
        for name, module in self.parents.items():
            modifier.hook(module, partial(self._parent_forward, modifier, name), "forward")

    def _parent_forward(self, modifier: Modifier, name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if not self.closed and tensor.requires_grad:
            self._first[name] = name
            tensor.register_hook(partial(self._take, name, module, modifier.batch_number, modifier.token_mask))

    def _forward(self, modifier: Modifier, name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self.closed or not (args and isinstance(output, Tensor) and torch.is_grad_enabled()):
            return None
        output = _with_gradient(output)
        entry, batch = self._inputs.get(id(args[0])), modifier.batch_number
        first = entry[1] if entry is not None and entry[0]() is args[0] else name
        self._inputs[id(args[0])] = weakref.ref(args[0]), first
        if self._first.setdefault(name, first) != first:
            self._first[name] = name
        output.register_hook(partial(self._take, name, module, batch, modifier.token_mask))
        return output

    def _take(self, name: str, module: nn.Module, batch: int, mask: Tensor | None, gradient: Tensor) -> None:
        key, weight = (self._first[name], batch), energies(module, gradient, mask)
        before = self._weights.get(key)
        self._weights[key] = weight if before is None else before + weight

    def state_dict(self) -> dict[str, Tensor]:
        """What the backward passes gave, before :meth:`close`, by number of the batch.

        ``groups.N``, int32 [layers, 2]: which layer's weights each has (-1: no tensor has reached it), and how many
        these are, where they are its own. ``weights.N``, float32: all of them, in the order of layers.
        """
        names, state = [*self.layers, *self.parents], {}
        number_of = {name: i for i, name in enumerate(names)}
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        firsts = [number_of.get(self._first.get(name, ""), -1) for name in names]
        for batch in sorted({batch for _, batch in self._weights}):
            weights = [self._weights.get((name, batch), none) for name in names]
            groups = list(zip(firsts, map(len, weights), strict=True))
            state[f"groups.{batch}"] = torch.tensor(groups, dtype=torch.int32, device="cpu")
            state[f"weights.{batch}"] = torch.cat([weight.cpu() for weight in weights])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, of all ranks; :meth:`close` drops batches of other ranks."""
        names = [*self.layers, *self.parents]
        for key in [key for key in state if key.startswith("groups.")]:
            firsts, sizes = state[key].unbind(1)
            batch = int(key.removeprefix("groups."))
            weights = state[f"weights.{batch}"].split(sizes.tolist())
            self._first |= {name: names[i] for name, i in zip(names, firsts.tolist(), strict=True) if i >= 0}
            self._weights |= {(name, batch): w for name, w in zip(names, weights, strict=True) if len(w)}

    def close(self, team: Team) -> None:
        """All batches were seen: the mean weight of each group, over tokens that count on all ranks, becomes 1."""
        self.closed, self._inputs = True, {}
        mine = {key: weight for key, weight in self._weights.items() if key[1] in team.mine(key[1] + 1)}
        self._weights = {key: weight.cpu() for key, weight in mine.items()}  # summed there after a restart, too
        sums: dict[str, list[tuple[float, int]]] = {}
        for (first, _), w_N in self._weights.items():
            sums.setdefault(first, []).append((float(w_N.double().sum()), len(w_N)))
        ranks = team.gather(sums, "weights of tokens")
        for (first, batch), w_N in self._weights.items():
            pairs = [pair for rank in ranks for pair in rank.get(first, [])]
            mean = math.fsum(total for total, _ in pairs) / max(1, sum(count for _, count in pairs))
            self._weights[first, batch] = w_N / mean if mean > 0 else torch.ones_like(w_N)

    def rows(self, name: str, module: nn.Module, x: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """The input as :func:`inputs_as_rows`, each token times the root of its weight; without weights as it is."""
        X_PNC = inputs_as_rows(module, x, mask)
        w_N = self._weights.get((self._first.get(name, name), batch))
        if w_N is None or len(w_N) != X_PNC.shape[1]:
            return X_PNC
        return X_PNC.float() * w_N.sqrt().to(X_PNC.device)[:, None]

    def of_output(self, parent: str, output: Tensor, mask: Tensor | None, batch: int) -> Tensor | None:
        """The weight at each place of a parent's output, float32, zero where none counts; None: not known."""
        w_N = self._weights.get((parent, batch))
        weights = torch.zeros(output.shape[:-1], dtype=torch.float32, device=output.device)
        places_N = counted(torch.arange(weights.numel(), device=output.device).view(weights.shape), mask).flatten()
        if w_N is None or len(w_N) != len(places_N):
            return None
        weights.view(-1)[places_N] = w_N.to(output.device)
        return weights


def tapped(output: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The output of a layer with input ``x``, as it is; in the backward pass ``take`` gets the input and the gradient.

    Autograd holds the input, so that a checkpointed block drops it and computes it again.
    """
    copied: Tensor = _Tap.apply(_with_gradient(output), x, take)
    return copied


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.clone()  # the model may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(x.detach(), gradient.detach())
        return gradient, None, None


def _with_gradient(output: Tensor) -> Tensor:
    """The output of a layer in a survey, which has a gradient; the model may change it in place."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()


def energies(module: nn.Module, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The squared norm of the gradient of a layer's output at each token that counts, float32 [N]."""
    features = 1 if isinstance(module, CONVOLUTIONS) else -1
    return counted(gradient.detach().float().square().sum(features), mask).flatten()
