"""Weights that stay zero while an optimizer trains them.

A masked weight is zero in the model itself, so that every checkpoint is sparse and keeps its dense keys. The mask is
applied to gradients before a step (they do not enter momentum) and to weights after it (earlier momentum or weight
decay cannot revive them).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.layers.matrix import check_weights_work, layout_of
from lightning_compress.layers.sharded import full, sharded_like
from lightning_compress.layers.tied_weights import check_unshared
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = [
    "MaskedWeights",
    "OneByOne",
    "check_matrices",
    "check_own_weights",
    "check_parametrizations",
    "trained_weight",
]


def trained_weight(module: nn.Module) -> Tensor:
    """The parameter that the optimizer trains: the weight, or the original behind a parametrization.

    Of a slice its part of the parameter: a view, without gradient (:func:`_gradient`).
    """
    if isinstance(module, WeightSlice):
        return module.slice_of(module.whole).detach()
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None and "weight" in parametrized:
        original: Tensor = parametrized.weight.original
        return original
    return module.get_parameter("weight")


def check_parametrizations(modules: Mapping[str, nn.Module]) -> None:
    """Zeros in a parameter are zeros of the weight only where no parametrization adds to it or scales it.

    Parametrizations of this package have the attribute ``keeps_zeros``: fake-quantization, learned masks.

    Raises:
        ValueError: Another parametrization (LoRA, weight_norm) computes a weight; modules and classes are named.
    """
    refused = []
    for name, module in modules.items():
        lists = getattr(module, "parametrizations", None)
        steps = lists["weight"].children() if isinstance(lists, nn.ModuleDict) and "weight" in lists else ()
        if foreign := [type(step).__name__ for step in steps if not getattr(step, "keeps_zeros", False)]:
            refused.append(f"{name!r} ({', '.join(foreign)})")
    if refused:
        raise ValueError(
            f"cannot prune {', '.join(refused[:5])}: a parametrization computes the weight, so that zeros in its "
            f"parameters are not zeros of the weight; merge it first "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or add the modules to ignore"
        )


def check_matrices(modules: Mapping[str, nn.Module], action: str) -> None:
    """ValueError names modules without a weight that can be seen as [R, C]; ``action`` is what the user asked for."""
    weights = {name: getattr(module, "weight", None) for name, module in modules.items()}
    other = [n for n, weight in weights.items() if not isinstance(weight, Tensor) or weight.dim() < 2]
    if other:
        raise ValueError(
            f"cannot {action} {', '.join(f'{name} ({type(modules[name]).__name__})' for name in other[:5])}: expected "
            f"modules with a weight of two or more dimensions; add them to ignore"
        )


def check_own_weights(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """ValueError names a module whose trained weight another module shares."""
    weights = {n: trained_weight(m) for n, m in modules.items() if "weight" in m._parameters or is_parametrized(m)}
    weights |= {name: module.whole for name, module in modules.items() if isinstance(module, WeightSlice)}
    check_unshared(model, modules, weights)


class OneByOne(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for: of sharded weights no rank holds more than one at a time."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = list(names), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MaskedWeights:
    """Modules and the masks of their weights; the mask of a sharded weight is sharded as that is.

    Args:
        modules: Modules by dotted name.

    Raises:
        ValueError: See :func:`check_parametrizations`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        check_weights_work(modules, "prune", in_place=True)
        check_parametrizations(modules)
        self.modules = dict(modules)
        self.masks: dict[str, Tensor] = {}

    def matrices(self) -> Mapping[str, Tensor]:
        """Every trained weight as W [R, C], detached; all ranks ask for those of a sharded model, in one order."""
        for name, mask in self.masks.items():
            self._check_shape(name, mask, _matrix(trained_weight(self.modules[name]), self.modules[name]))
        return OneByOne(self.modules, self._whole)

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Take new masks (bool [R, C], True survives) and apply them to the weights."""
        self.masks = {name: self._placed(name, mask) for name, mask in masks.items()}
        self.apply_to_weights()

    def whole_masks(self) -> dict[str, Tensor]:
        """The masks as plain tensors, for checkpoints; every rank of a sharded model calls this."""
        return {name: full(mask) for name, mask in self.masks.items()}

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        for name in self.masks:
            trained_weight(self.modules[name]).mul_(self._like(name))

    @torch.no_grad()
    def apply_to_gradients(self, among: Collection[int] | None = None) -> None:
        """Masked weights get no gradient; ``among``: identities of the parameters that are stepped, None: all."""
        for name in self.masks:
            gradient = _gradient(self.modules[name], among)
            if gradient is not None:
                gradient.mul_(self._like(name))

    def gradients(self, among: Collection[int] | None = None) -> dict[str, Tensor]:
        """The gradients of weights that have one, as [R, C]; ``among`` as above."""
        gradients = {name: _gradient(module, among) for name, module in self.modules.items()}
        return {n: _matrix(grad, self.modules[n]) for n, grad in gradients.items() if grad is not None}

    @torch.no_grad()
    def write(self, name: str, W_RC: Tensor) -> None:
        """Another value for one weight, in place."""
        weight = trained_weight(self.modules[name])
        weight.copy_(_shaped(W_RC, self.modules[name], weight))

    def sparsity(self) -> dict[str, float]:
        """Share of zeros in each weight, counted in the weight itself."""
        return {name: (W_RC == 0).float().mean().item() for name, W_RC in self.matrices().items()}

    def mean_sparsity(self) -> float:
        """Share of zeros among all weights together."""
        matrices = self.matrices().values()
        return sum(int((W_RC == 0).sum()) for W_RC in matrices) / max(1, sum(W_RC.numel() for W_RC in matrices))

    def _like(self, name: str) -> Tensor:
        """The mask in the shape and on the device of the weight; a model may have moved since it was chosen."""
        weight = trained_weight(self.modules[name])
        self._check_shape(name, self.masks[name], _matrix(weight, self.modules[name]))
        self.masks[name] = self._placed(name, self.masks[name])
        return _shaped(self.masks[name], self.modules[name], weight)

    def _placed(self, name: str, mask: Tensor) -> Tensor:
        """The mask where the weight is: on its device, and in shards like those of a sharded weight."""
        module = self.modules[name]
        return sharded_like(mask.to(trained_weight(module).device), _matrix(trained_weight(module), module))

    def _whole(self, name: str) -> Tensor:
        module = self.modules[name]
        return _matrix(full(trained_weight(module)), module)

    @staticmethod
    def _check_shape(name: str, mask_RC: Tensor, W_RC: Tensor) -> None:
        if mask_RC.shape != W_RC.shape:
            raise ValueError(
                f"the mask of {name!r} is {tuple(mask_RC.shape)}, and its weight is {tuple(W_RC.shape)} now: its shape "
                f"changed after the mask was chosen; let structured pruning end before masks begin"
            )


def _gradient(module: nn.Module, among: Collection[int] | None) -> Tensor | None:
    """The gradient of a trained weight, of a slice the view of its part; None where there is none to change."""
    parameter = module.whole if isinstance(module, WeightSlice) else trained_weight(module)
    if parameter.grad is None or not (among is None or id(parameter) in among):
        return None
    return module.slice_of(parameter.grad) if isinstance(module, WeightSlice) else parameter.grad


def _matrix(weight: Tensor, module: nn.Module) -> Tensor:
    return layout_of(module).matrix(weight.detach())


def _shaped(W_RC: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
    return layout_of(module).stored(W_RC, weight.shape)
