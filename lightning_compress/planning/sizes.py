"""Bytes of a model before and after quantization, from shapes and schemes alone."""

from collections.abc import Mapping

from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.export.contents import contents_of
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.quant.weight_metrics import planned_bytes, record_without_values

__all__ = ["dense_reasons", "model_bytes", "packed_bytes"]


def packed_bytes(module: nn.Module, scheme: QuantizationScheme) -> int:
    """Bytes that replace the weight of a Linear or an Embedding in an export."""
    return planned_bytes(as_matrix(module), scheme)


def dense_reasons(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> dict[str, str]:
    """Modules whose weight an export writes dense although it is quantized, and why.

    ``model`` is a copy without weights, which gets records here.
    """
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        record_without_values(as_matrix(module), scheme).attach(module)
    return dict(contents_of(model, {}).dense)


def model_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of its state dict; tied ones count once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
