"""Who can read the export that a recipe will write."""

from collections.abc import Mapping, Sequence

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.core import Modifier
from lightning_compress.export.experts import planned_fault
from lightning_compress.layers.split_experts import split_while
from lightning_compress.planning.copies import without_weights
from lightning_compress.structure.config import is_transformers

__all__ = ["readers_of"]

USUAL_BITS = (4, 8)  # of packed integers: all versions of vLLM have kernels for these


def readers_of(
    model: nn.Module, modifiers: Sequence[Modifier], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, str]:
    """By reader an empty string, or why it cannot read the export."""
    if not is_transformers(model):
        foreign = f"a {type(model).__name__} is not a model of transformers; build it, then load(folder, model)"
        return {"lightning_compress.load": "", "transformers": foreign, "vLLM": foreign}
    copied = without_weights(model)
    with split_while(copied):
        fault = planned_fault(copied, schemes)
    weights = [scheme.weights for scheme in schemes.values() if scheme.input_activations is None]
    odd = sorted({args.num_bits for args in weights if args.type == "int" and args.num_bits not in USUAL_BITS})
    bits = f"{', '.join(map(str, odd))} bits need a recent version, and a kernel for the GPU" if odd else ""
    readers = {"lightning_compress.load": "", "transformers": fault, "vLLM": bits}
    for modifier in modifiers:
        readers |= dict.fromkeys(modifier.unread_by, f"what {modifier.name} runs beside the layers is lost")
    return readers
