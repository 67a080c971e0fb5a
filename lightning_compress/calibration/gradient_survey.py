"""A backward pass of the dense model for each calibration batch: gradients of a loss whose labels it draws itself.

    classes          y ~ softmax(logits),  L = sum over tokens of -log p(y)      E[g g^T] is Fisher's matrix
    values           e ~ N(0, I),          L = sum of output * e                 the same for a normal distribution
    training_step    L as the user trains on it, with the labels of the batch

So the first two need no labels, and the gradients say where the model's own answer is sensitive. No parameter needs a
gradient: the outputs of hooked modules do. Labels of a batch depend on the seed and on its number, not on ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.calibration.activations import tensors_of
from lightning_compress.calibration.residence import Residence
from lightning_compress.calibration.whole_model import checkpointed
from lightning_compress.core import Modifier
from lightning_compress.layers.forward import gradients_for
from lightning_compress.layers.outputs import logits_of
from lightning_compress.team import Team

__all__ = ["Gradients", "gradients_of", "sampled_loss"]


class Gradients:
    """Backward passes for those modifiers that need them.

    Args:
        kind: ``classes``, ``values`` or ``training_step``.
        seed: Of the labels.
        user_loss: ``State.user_loss``, for ``training_step``.
    """

    def __init__(self, kind: str, seed: int, user_loss: Callable[[Any, int], Tensor | None] | None = None):
        self.kind, self.seed, self.user_loss = kind, seed, user_loss
        self.count = 0  # of batches whose loss had gradients

    @contextmanager
    def enabled(self, model: nn.Module, blocks: Mapping[str, nn.Module], residence: Residence) -> Iterator[None]:
        """Inside, forward passes build a graph, in which no parameter takes part; blocks store their inputs only."""
        names = {block: name for name, block in blocks.items()}
        present = checkpointed(blocks.values(), lambda block: residence.visit(names[block], block))
        with gradients_for(model, ()), torch.enable_grad(), present:
            yield

    def run(self, output_of: Callable[[Any], Any], batch: Any, mask: Tensor | None, number: int) -> None:
        """Batch ``number`` forwards (by ``output_of``, but for the user's loss) and back: hooks get gradients."""
        if self.user_loss is not None:
            loss = self.user_loss(batch, number)
        else:
            loss = sampled_loss(output_of(batch), self.kind, mask, self.seed * 1_000_003 + number)
        if loss is not None and loss.requires_grad:  # else no hooked module was reached
            self.count += 1
            loss.backward()

    def check(self, team: Team) -> None:
        """ValueError where the user's loss had no gradients in any batch of any rank."""
        if self.user_loss is not None and not team.agree(self.count > 0, "the survey of the dense model"):
            raise ValueError(
                "objective='training_step': in no calibration batch did the loss have a gradient with respect to the "
                "model that is compressed; training_step (or loss=) must compute its loss from that model's output, "
                "without no_grad() or detach(), and return it"
            )


def gradients_of(
    modifiers: Sequence[Modifier], seed: int, user_loss: Callable[[Any, int], Tensor | None] | None = None
) -> Gradients | None:
    """What these modifiers need; None: no gradients.

    Raises:
        ValueError: They need gradients of different losses, or of a loss of the user that there is not.
    """
    kinds = {modifier.needs.gradients: modifier.name for modifier in modifiers if modifier.needs.gradients}
    if len(kinds) > 1:
        named = " and ".join(f"{name} those of {kind}" for kind, name in kinds.items())
        raise ValueError(f"one survey has gradients of one loss, and {named} are asked for; give them one objective")
    if "training_step" not in kinds:
        return Gradients(str(next(iter(kinds))), seed) if kinds else None
    if user_loss is None:
        raise ValueError(
            f"{kinds['training_step']}: objective='training_step' takes the loss of a LightningModule, and there is "
            f"none here: give loss=lambda model, batch: ... to compress(), or train with a Trainer"
        )
    return Gradients("training_step", seed, user_loss)


def sampled_loss(output: Any, kind: str, mask: Tensor | None, seed: int) -> Tensor:
    """The loss of one batch, summed over tokens that count, float32.

    Args:
        output: What the model returned.
        kind: ``classes`` or ``values``.
        mask: True for tokens that count, bool [batch, tokens]; None, or another shape than that of the logits: all do.
        seed: Of the labels.

    Raises:
        ValueError: No logits, or no tensor of floats, in the output.
    """
    random = torch.Generator().manual_seed(seed)
    if kind == "values":
        values = next((tensor for tensor in tensors_of(output) if tensor.is_floating_point()), None)
        if values is None:
            raise ValueError(f"found no tensor of floats in an output of type {type(output).__name__}")
        noise = torch.randn(values.shape, generator=random, dtype=torch.float32, device="cpu").to(values.device)
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            noise = noise * mask.to(noise.device).view(*mask.shape, *[1] * (noise.ndim - mask.ndim))
        return (values.float() * noise).sum()
    logits_NV = logits_of(output).float().flatten(0, -2)
    with torch.no_grad():
        cumulated_NV = logits_NV.softmax(-1).cumsum(-1)
        drawn_N = torch.rand(len(logits_NV), 1, generator=random, dtype=torch.float32, device="cpu").to(
            cumulated_NV.device
        )
        labels_N = torch.searchsorted(cumulated_NV, drawn_N * cumulated_NV[:, -1:])[:, 0]
        labels_N.clamp_(max=logits_NV.shape[1] - 1)  # the sum ends below 1 at times
    each_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    counts = mask is not None and mask.numel() == len(each_N)
    return (each_N * mask.to(each_N.device).flatten() if counts and mask is not None else each_N).sum()
