"""Who reads an export besides this package: what plans say before a run, and the model card after it."""

from collections.abc import Iterable

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

__all__ = ["foreign_kind", "server_fault"]

USUAL_BITS = (4, 8)  # of packed integers: all versions of vLLM have kernels for these


def foreign_kind(model: nn.Module) -> str:
    """Why only this package reads a model that is not one of transformers."""
    return f"a {type(model).__name__} is not a model of transformers; build it, then load(folder, model)"


def server_fault(schemes: Iterable[QuantizationScheme]) -> str:
    """Why vLLM may not run packed modules of these schemes; empty where it does."""
    weights = [scheme.weights for scheme in schemes if scheme.input_activations is None]
    odd = sorted({args.num_bits for args in weights if args.type == "int" and args.num_bits not in USUAL_BITS})
    return f"{', '.join(map(str, odd))} bits need a recent version, and a kernel for the GPU" if odd else ""
