"""The parametrization of a weight whose N:M mask is learned: logits, noise, the soft and the hard mask."""

import torch
from torch import Tensor, nn

from lightning_compress.layers.dense_keys import parametrization_of
from lightning_compress.layers.matrix import layout_of
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.modifiers.learned_mask.gumbel import gumbel, hard_mask, soft_mask

__all__ = ["MaskLogits", "logits_of", "noise_seed", "other_parametrizations"]


class MaskLogits(nn.Module):
    """The parametrization of a weight: the dense weight, times a soft or a hard mask while it is ``active``.

    Args:
        module: The layer, its weight still dense.
        S_KM: The patterns.
        logits: Initial logits, float32 [R, C / M, K].
    """

    passes_in_the_end = True  # see layers/matrix.py
    keeps_zeros = True  # see pruning/masked.py

    def __init__(self, module: nn.Module, S_KM: Tensor, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.S_KM, self.layout = S_KM, layout_of(module)
        self.active = False
        self.in_batch = False  # inside a training batch, also in passes without gradients
        # tensors: new numbers would be compiled anew in each step
        self.kappa, self.tau = (torch.ones((), dtype=torch.float32, device="cpu") for _ in range(2))
        self.seed = 0

    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            # DDP waits for the gradient of every parameter, and gets zeros
            unused = 0 * self.logits.sum().to(weight.dtype) if torch.is_grad_enabled() else None
            return weight.view_as(weight) if unused is None else weight + unused  # a view: no second owner of it
        soft = (
            self.in_batch or torch.is_grad_enabled()
        )  # not module.training: models of from_pretrained train in eval mode
        mask = self.soft() if soft else self.hard()
        return weight * self.like(mask, weight)

    def soft(self) -> Tensor:
        """The mask of this batch, [R, C]."""
        device = self.logits.device
        self.S_KM, self.kappa, self.tau = self.S_KM.to(device), self.kappa.to(device), self.tau.to(device)
        return soft_mask(self.logits, self._noise(), self.kappa, self.tau, self.S_KM)

    def hard(self) -> Tensor:
        """The mask that is most likely, bool [R, C]."""
        self.S_KM = self.S_KM.to(self.logits.device)
        return hard_mask(self.logits.detach(), self.S_KM)

    def like(self, mask_RC: Tensor, weight: Tensor) -> Tensor:
        return self.layout.stored(mask_RC, weight.shape).to(weight.dtype)

    @torch.compiler.disable  # a generator cannot be traced
    def _noise(self) -> Tensor:
        return gumbel(tuple(self.logits.shape), self.seed, self.logits.device)


def logits_of(module: nn.Module) -> MaskLogits:
    """The logits of a module that has them."""
    logits = parametrization_of(module, MaskLogits)
    assert logits is not None
    return logits


def other_parametrizations(module: nn.Module) -> list[nn.Module]:
    """The parametrizations of a weight beside its logits."""
    if isinstance(module, WeightSlice):  # has one at most
        return []
    children = module.get_submodule("parametrizations.weight").children()
    return [child for child in children if not isinstance(child, MaskLogits)]


def noise_seed(seed: int, batch: int, index: int) -> int:
    """One number for the noise of one module in one batch; neighbours are far apart."""
    mixed = seed
    for number in (batch, index):
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
