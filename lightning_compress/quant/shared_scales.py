"""One global scale of NVFP4 for weights that servers fuse into one: query, key and value; gate and up.

vLLM holds such weights as one matrix with one global scale, the largest one in the checkpoint, which would change the
other weights. A shared scale loses nothing: g only places the range of the E4M3 scales.
"""

from collections.abc import Collection, Mapping

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.layers.matrix import as_matrix
from lightning_compress.quant.formats import global_scale_of, has_global_scale

__all__ = ["GlobalScales", "fused_with"]

FUSED = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
)


class GlobalScales:
    """The global scales of quantized modules, by dotted name, each computed when it is first needed, and kept."""

    def __init__(self, modules: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]):
        self._modules = {name: modules[name] for name, scheme in schemes.items() if _is_nvfp4(scheme)}
        self._scales: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """g, float32 [1], from the weights as they are now; None where the scheme has none."""
        if name not in self._modules:
            return None
        if name not in self._scales:
            names = fused_with(name, self._modules)
            lows, highs = zip(*(as_matrix(self._modules[n]).float().aminmax() for n in names), strict=True)
            low, high = torch.stack(lows).amin(), torch.stack(highs).amax()
            self._scales |= dict.fromkeys(names, global_scale_of(low, high))
        return self._scales[name]


def fused_with(name: str, names: Collection[str]) -> list[str]:
    """Those of ``names`` that servers fuse into one weight with the module ``name``; it is among them."""
    parent, _, last = name.rpartition(".")
    group = next((group for group in FUSED if last in group), {last})
    siblings = [f"{parent}.{other}" if parent else other for other in sorted(group)]
    return [other for other in siblings if other in names]


def _is_nvfp4(scheme: QuantizationScheme) -> bool:
    return scheme.weights is not None and has_global_scale(scheme.weights)
