"""Learned projections between hidden states of different widths (Romero et al. 2015, arXiv:1412.6550).

They belong to the training, not to the model: they train with a separate AdamW, are saved with the run and never
exported. Their gradients are computed before backward, from the distance alone, so that loss scaling, clipping and
DDP's buckets do not affect them; over ranks they are averaged. They begin equal on all ranks and do not use the global
random state.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.team import Team

__all__ = ["Projections"]


class Projections:
    """One matrix [teacher's width, student's width] for each name, made when it is first asked for."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.weights: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._used: dict[str, Tensor] = {}  # leaves of this batch's graph, by name
        self._stale = False

    def project(self, name: str, hidden: Tensor, width: int) -> Tensor:
        """A hidden state [..., student's width] in the teacher's width, float32."""
        if name not in self.weights:
            generator = torch.Generator().manual_seed(len(self.weights))
            bound = hidden.shape[-1] ** -0.5
            weight = torch.empty(width, hidden.shape[-1], dtype=torch.float32, device="cpu")
            weight.uniform_(-bound, bound, generator=generator)
            self._add(name, weight)
        self._follow(self.weights[name], hidden.device)
        self._used[name] = self.weights[name].detach().requires_grad_()
        return hidden.float() @ self._used[name].T

    def collect(self, distance: Tensor) -> None:
        """Add the gradient of a distance; the graph stays for the backward pass of the student."""
        if self._stale:  # the last step was skipped: half precision overflowed
            self._drop_gradients()
        if not self._used:
            return
        gradients = torch.autograd.grad(distance, list(self._used.values()), retain_graph=True)
        for name, gradient in zip(self._used, gradients, strict=True):
            before = self.weights[name].grad
            self.weights[name].grad = gradient if before is None else before + gradient
        self._used = {}

    def before_step(self) -> None:
        """The student's optimizer will step, unless its gradients overflowed."""
        self._stale = True

    def step(self) -> None:
        """The student's optimizer has stepped; over ranks the mean of the gradients counts."""
        self._stale = False
        if self.optimizer is None:
            return
        team = Team.present()
        if not team.alone:
            for weight in self.weights.values():
                if weight.grad is not None:
                    total = SimpleNamespace(reduce={"grad": "sum"}, grad=weight.grad)
                    team.reduce_(total)
                    weight.grad = total.grad / team.size
        self.optimizer.step()
        self._drop_gradients()

    def state_dict(self) -> dict[str, Any]:
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": None if self.optimizer is None else self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.optimizer = {}, None
        for name, weight in state["weights"].items():
            self._add(name, weight)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _add(self, name: str, weight: Tensor) -> None:
        weight = weight.detach().clone().requires_grad_()
        self.weights[name] = weight
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([weight], lr=self.lr)
        else:
            self.optimizer.add_param_group({"params": [weight]})

    def _follow(self, weight: Tensor, device: torch.device) -> None:
        """Move a matrix to the device of the model, with its gradient and its state in AdamW."""
        if weight.device == device:
            return
        weight.data = weight.data.to(device)
        weight.grad = None if weight.grad is None else weight.grad.to(device)
        state = self.optimizer.state.get(weight, {}) if self.optimizer is not None else {}
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key] = state[key].to(device)

    def _drop_gradients(self) -> None:
        self._stale = False
        for weight in self.weights.values():
            weight.grad = None
