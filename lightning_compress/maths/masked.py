"""Weights that stay zero while an optimizer works on them.

A masked weight is zero in the model itself, so that every checkpoint is sparse and keeps its dense keys. The mask is
applied to gradients before a step (they do not enter momentum) and to weights after it (momentum from before, or
weight decay, cannot bring them back).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_compress.quant.matrix import is_transposed

__all__ = ["MaskedWeights", "trained_weight"]


def trained_weight(module: nn.Module) -> nn.Parameter:
    """The parameter that the optimizer moves: the weight, or what a parametrization (fake-quantization) is made of."""
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None and "weight" in parametrized:
        return parametrized.weight.original
    return module.get_parameter("weight")


class MaskedWeights:
    """Modules and the masks of their weights.

    Args:
        modules: By dotted name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = dict(modules)
        self.masks: dict[str, Tensor] = {}

    def matrices(self) -> dict[str, Tensor]:
        """Every trained weight as W [R, C], detached."""
        return {name: self._matrix(module) for name, module in self.modules.items()}

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Take new masks (bool [R, C], True survives) and apply them to the weights."""
        self.masks = dict(masks)
        self.apply_to_weights()

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        for name, mask in self.masks.items():
            weight = trained_weight(self.modules[name])
            weight.mul_(self._like(mask, self.modules[name], weight))

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        for name, mask in self.masks.items():
            weight = trained_weight(self.modules[name])
            if weight.grad is not None:
                weight.grad.mul_(self._like(mask, self.modules[name], weight))

    def sparsity(self) -> dict[str, float]:
        """Share of zeros in each weight, counted in the weight itself."""
        return {name: (W_RC == 0).float().mean().item() for name, W_RC in self.matrices().items()}

    @staticmethod
    def _matrix(module: nn.Module) -> Tensor:
        weight = trained_weight(module).detach()
        return weight.t() if is_transposed(module) else weight.flatten(1)

    @staticmethod
    def _like(mask_RC: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
        mask_RC = mask_RC.to(weight.device)
        return mask_RC.t() if is_transposed(module) else mask_RC.reshape(weight.shape)
