"""Towers of multimodal models of transformers: what turns images or sounds into tokens of a language model.

model.vision_tower, model.audio_tower             encoders of images and sounds
model.multi_modal_projector, model.connector      map their outputs to the width of the language model
model.language_model                              is not a tower
"""

from collections.abc import Collection
from typing import Any

from torch import nn

__all__ = ["find_towers", "tower_of"]


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """Encoders of images and sounds, and projectors, by dotted name; empty where there is no language model beside.

    They are children of the module that holds both an encoder and the language model.
    """
    for name, module in model.named_modules():
        if (decoder := _language_model(module)) is not None:
            towers = [tower for kind in ("image", "audio") for tower in _towers(module, decoder, kind)]
            names = {inner: local for local, inner in module.named_modules(prefix=name)}
            return {names[tower]: tower for tower in dict.fromkeys(towers)}
    return {}


def tower_of(name: str, towers: Collection[str]) -> str | None:
    """The name of the tower that a module is, or is inside of."""
    return next((tower for tower in towers if f"{name}.".startswith(f"{tower}.")), None)


def _language_model(module: Any) -> nn.Module | None:
    """The language model of a multimodal model; None for others, such as the two encoders of CLIP."""
    config = getattr(module, "config", None)
    if not any(hasattr(config, f"{kind}_config") for kind in ("vision", "audio")):
        return None
    if not (hasattr(module, "get_decoder") and hasattr(module, "get_encoder") and hasattr(module, "can_generate")):
        return None
    if not (module.can_generate() or hasattr(module, "language_model")):
        return None
    decoder = module.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not module else None


def _towers(model: Any, decoder: nn.Module, kind: str) -> list[nn.Module]:
    encoder = model.get_encoder(modality=kind)
    if not isinstance(encoder, nn.Module) or encoder in (model, model.base_model):
        return []  # transformers returns the model where it has no such encoder
    both = [m for m in model.modules() if {encoder, decoder} <= set(m.modules())]
    text = {decoder, model.get_input_embeddings(), model.get_output_embeddings()}
    towers = [child for child in both[-1].children() if _has_weights(child) and not text & set(child.modules())]
    return towers if any(encoder in tower.modules() for tower in towers) else [encoder]


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())
