"""Runs in which masks are learned."""

from torch import nn

from lightning_compress.core import Lifecycle, State
from lightning_compress.layers.dense_keys import parametrization_of
from lightning_compress.modifiers.learned_mask.mask_logits import MaskLogits
from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier


def logits_of(module: nn.Module) -> MaskLogits:
    found = parametrization_of(module, MaskLogits)
    assert found is not None
    return found


def started(model: nn.Module, **options) -> tuple[LearnedMaskModifier, Lifecycle]:
    modifier = LearnedMaskModifier(**{"end": 100} | options)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State(model=model))
    return modifier, lifecycle
