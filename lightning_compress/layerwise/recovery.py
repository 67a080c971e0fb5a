"""Recover from pruning: modules that hold pruned layers learn the outputs that they have in the dense model.

    for each such module U (attention, MLP), one after the other:
        min over the weights that stay    sum over batches of ||U(x) - U_dense(x_dense)||^2 / ||U_dense(x_dense)||^2

x comes from modules that are pruned and recovered already, so that U corrects their errors, too. Adam takes one step
for each calibration batch, relative to the root mean square of the weight; its rate falls to zero along a cosine. One
of eight batches is held out: the epoch with the least error there is kept, and none where that is the pruned module.

Shapes: R rows (outputs), C columns (inputs).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core import Modifier, State
from lightning_compress.layers.forward import gradients_for
from lightning_compress.layers.matrix import as_matrix, parameter_of, write_matrix
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.layerwise.parent import ParentCalls, Place, counted, first_tensor, record_calls
from lightning_compress.layerwise.short_descent import set_rate, short_adam

__all__ = ["Recovered", "Recovery", "parents_of"]

HELD_OUT = 8  # one of so many batches


@dataclass(frozen=True)
class Recovered:
    """Errors on held-out batches, as shares of the dense output, before and after; the best epoch, 0: none."""

    began: float
    ended: float
    epoch: int


class Recovery:
    """The modules to recover, and their outputs in the dense model while a block is calibrated.

    Args:
        model: The model.
        layers: Layers that are pruned, by name.
        epochs: Passes over the batches that are not held out.
        rate: Relative size of a step at the start.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], epochs: int, rate: float):
        self.epochs, self.rate, self.layers = epochs, rate, dict(layers)
        self.members = parents_of(model, layers)
        self._dense: dict[str, dict[int, Tensor]] = {}

    def watch(self, modifier: Modifier, model: nn.Module) -> None:
        """Let the dense passes give outputs to this object."""
        for name in self.members:
            modifier.hook(model.get_submodule(name), partial(self._keep, modifier, name), "forward")

    def _keep(self, modifier: Modifier, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if modifier.dense_pass:
            outputs, number = self._dense.setdefault(name, {}), modifier.batch_number
            tensor = first_tensor(output).detach()
            outputs[number] = tensor.clone() if number not in outputs else tensor.new_empty(0)

    def drop(self, modules: Mapping[str, nn.Module]) -> None:
        """A block is finished."""
        self._dense = {name: outputs for name, outputs in self._dense.items() if name not in modules}

    def recover(self, state: State, modifier: Modifier) -> dict[str, Recovered]:
        """Train the modules of a block that is pruned now; those are left out that do not run once for each batch."""
        results = {}
        names = [name for name in state.modules if name in self.members]
        for name in sorted(names, key=lambda name: any(other.startswith(f"{name}.") for other in names)):
            if state.team.agree(state.replay is None or name not in self._dense, name):
                continue
            with torch.inference_mode(False), torch.no_grad():
                calls = _present_calls(name, state, modifier)
                if state.team.agree(not self._set_targets(name, calls), name):
                    continue
                weights = [_Weight(self.layers[layer]) for layer in self.members[name]]
                results[name] = self._learn(state, calls, weights)
        self.drop(state.modules)
        return results

    def _set_targets(self, name: str, calls: ParentCalls) -> bool:
        """Put the dense outputs in place of those that were recorded; False where that cannot be."""
        dense = [self._dense[name].get(number) for number in calls.batches]
        outputs = [target for target in dense if target is not None]
        shapes = [target.shape for target in outputs] == [output.shape for output in calls.outputs]
        calls.outputs = outputs if shapes else calls.outputs
        return shapes and len(set(calls.batches)) == len(calls.batches)

    def _learn(self, state: State, calls: ParentCalls, weights: "Sequence[_Weight]") -> Recovered:
        everywhere = state.team.gather(calls.batches, "recovery")
        numbers = sorted(number for rank in everywhere for number in rank)
        held_out = numbers[min(HELD_OUT // 2, len(numbers) - 1) :: HELD_OUT]
        training = [number for number in numbers if number not in held_out]
        if not training:
            raise ValueError("recovery needs at least two calibration batches, one of them held out; use smaller ones")
        optimizer = short_adam([weight.change_RC for weight in weights], self.rate)
        errors = [self._error(state, calls, held_out)]
        best, changes = 0, [weight.change_RC.clone() for weight in weights]
        order, steps = torch.Generator().manual_seed(0), self.epochs * len(training)
        for step in range(steps):
            if step % len(training) == 0:
                shuffled = torch.randperm(len(training), generator=order, device="cpu").tolist()
            set_rate(optimizer, self.rate, step, steps)
            self._step(state, calls, training[shuffled[step % len(training)]], weights, optimizer)
            if (step + 1) % len(training) == 0:
                errors.append(self._error(state, calls, held_out))
                if errors[-1] < errors[best]:
                    best, changes = len(errors) - 1, [weight.change_RC.clone() for weight in weights]
        for weight, change_RC in zip(weights, changes, strict=True):
            weight.write(change_RC)
        return Recovered(errors[0], errors[best], best)

    def _error(self, state: State, calls: ParentCalls, numbers: Sequence[int]) -> float:
        """The error on some batches as a share of the dense output."""
        places: list[Place] = [place for place in calls.places() if place[0] in numbers]
        powers = [_power(calls, i) for _, i in places]
        ranks = state.team.gather((list(calls.squared_errors(places).values()), powers), "recovery")
        error, power = (math.fsum(value for rank in ranks for value in rank[k]) for k in (0, 1))
        return error / power if power else 0.0

    def _step(
        self,
        state: State,
        calls: ParentCalls,
        number: int,
        weights: "Sequence[_Weight]",
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if number in calls.batches:
            i = calls.batches.index(number)
            parameters = [parameter_of(weight.module) for weight in weights]
            with gradients_for(state.model, parameters), torch.enable_grad():
                output, dense = (counted(t, calls.masks[i]).float() for t in (calls.run(i), calls.outputs[i]))
                loss = (output - dense).square().sum() / max(_power(calls, i), torch.finfo(torch.float32).tiny)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.sum_RC += as_matrix(weight.module, like=gradient).float() * weight.keep_RC * weight.unit
        for weight in weights:
            state.team.reduce_(weight)
            weight.change_RC.grad = weight.sum_RC.clone()
            weight.sum_RC.zero_()
        optimizer.step()
        for weight in weights:
            weight.write(weight.change_RC)


def _present_calls(name: str, state: State, modifier: Modifier) -> ParentCalls:
    """The calls of a module in all batches, as its block is now."""
    replay = state.replay
    assert replay is not None

    def run() -> None:
        for i in range(state.batches):
            replay(i)

    modules = {name: state.modules[name]}
    return record_calls(modules, run, lambda: modifier.token_mask, lambda: modifier.batch_number)[name]


class _Weight:
    """A pruned weight that learns: W = W_0 + unit * change where it is not zero."""

    reduce = {"sum_RC": "sum"}

    def __init__(self, module: nn.Module):
        self.module = module
        self.start_RC = as_matrix(module).float().clone()
        self.keep_RC = self.start_RC != 0
        self.unit = max(float(self.start_RC.square().mean().sqrt()), torch.finfo(torch.float32).tiny)
        self.change_RC, self.sum_RC = torch.zeros_like(self.start_RC), torch.zeros_like(self.start_RC)

    def write(self, change_RC: Tensor) -> None:
        """Put the weight into the module."""
        write_matrix(self.module, self.start_RC + self.unit * change_RC * self.keep_RC)


def _power(calls: ParentCalls, i: int) -> float:
    return float(counted(calls.outputs[i], calls.masks[i]).float().square().sum().double())


def parents_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each module that directly holds layers, not counting lists of modules, the names of these layers.

    Layers of the model itself and single experts are left out.
    """
    members: dict[str, list[str]] = {}
    for name, module in layers.items():
        parent = name.rpartition(".")[0]
        while parent and isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
            parent = parent.rpartition(".")[0]
        if parent and not isinstance(module, WeightSlice):
            members.setdefault(parent, []).append(name)
    return members
