"""Save an export without its weights into a temporary folder, so that errors appear before the work begins."""

import tempfile
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_compress.export import hugging_face

__all__ = ["check_adapters", "check_processors", "rehearse"]


def rehearse(model: nn.Module, processors: Sequence[Any]) -> None:
    """ValueError for PEFT adapters, and when a config, a tokenizer or a processor cannot be saved."""
    check_adapters(model)
    check_processors(processors)
    with tempfile.TemporaryDirectory() as folder:
        if hugging_face.is_transformers(model):
            try:
                hugging_face.write_configs(model, folder)
            except Exception as error:
                kind = type(model).__name__
                if isinstance(getattr(model, "_tied_weights_keys", None), list):
                    raise ValueError(
                        f"{kind}._tied_weights_keys is a list, and transformers 5 saves only models with a dict there: "
                        f"name the source of each tied weight, such as "
                        f"{{'lm_head.weight': 'model.embed_tokens.weight'}}"
                    ) from error
                raise ValueError(
                    f"the configs of this {kind} cannot be saved, so that the export at the end would fail: {error}"
                ) from error
        for processor in processors:
            try:
                processor.save_pretrained(folder)
            except Exception as error:
                raise ValueError(
                    f"this {type(processor).__name__} cannot be saved, so that the export at the end would fail: "
                    f"{type(error).__name__}: {error}; correct it, or keep it under another name than those that are "
                    f"exported (tokenizer, processor, image_processor, feature_extractor)"
                ) from error


def check_adapters(model: nn.Module) -> None:
    """ValueError for PEFT adapters, whether transformers or ``get_peft_model`` put them in."""
    peft = [name for name, module in model.named_modules() if _is_of_peft(type(module))]
    if peft or getattr(model, "_hf_peft_config_loaded", False):
        at = f" ({peft[0]!r}, ...)" if peft and peft[0] else ""
        raise ValueError(
            f"the model carries PEFT adapters{at}; merge them into its weights (merge_and_unload), compress that, then "
            f"save"
        )


def _is_of_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def check_processors(processors: Sequence[Any]) -> None:
    """ValueError for what is neither a tokenizer nor a processor."""
    for processor in processors:
        if not hasattr(processor, "save_pretrained"):
            raise ValueError(
                f"tokenizer={processor!r} is a {type(processor).__name__}, expected a tokenizer or processor with "
                f"save_pretrained, such as AutoTokenizer.from_pretrained(...), or a list of them"
            )
