"""Who can read the export that a recipe will write."""

from collections.abc import Mapping, Sequence

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.core import Modifier
from lightning_compress.export.experts import planned_fault
from lightning_compress.export.readers import foreign_kind, server_fault
from lightning_compress.layers.split_experts import split_while
from lightning_compress.planning.copies import without_weights
from lightning_compress.structure.config import is_transformers

__all__ = ["readers_of"]


def readers_of(
    model: nn.Module, modifiers: Sequence[Modifier], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, str]:
    """By reader an empty string, or why it cannot read the export."""
    if not is_transformers(model):
        foreign = foreign_kind(model)
        return {"lightning_compress.load": "", "transformers": foreign, "vLLM": foreign}
    copied = without_weights(model)
    with split_while(copied):
        fault = planned_fault(copied, schemes)
    readers = {"lightning_compress.load": "", "transformers": fault, "vLLM": server_fault(schemes.values())}
    for modifier in modifiers:
        readers |= dict.fromkeys(modifier.unread_by, f"what {modifier.name} runs beside the layers is lost")
    return readers
