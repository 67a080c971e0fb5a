"""Which schemes a PackedLinear holds, and whether tensors fit a scheme.

Shapes: N output features, K input features, G groups of K / G columns.
"""

from collections.abc import Mapping

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.quant.packing import ACTIVATION_NAMES, tensor_names

__all__ = ["check_tensors", "fault_of"]

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


def fault_of(scheme: QuantizationScheme) -> str | None:
    """What keeps a scheme out of a PackedLinear."""
    weights = scheme.weights
    if weights is None:
        return "scheme without weights"
    if weights.strategy not in STRATEGIES:
        return f"scheme with weights of strategy {weights.strategy}"
    if scheme.output_activations is not None:
        return "scheme with quantized outputs"
    return None


def check_tensors(tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> tuple[int, int]:
    """N and K of tensors that fit one another and the scheme; ValueError where they do not."""
    if (fault := fault_of(scheme)) is not None:
        raise ValueError(f"a PackedLinear cannot hold a {fault}; leave the Linear dense")
    names = tensor_names(nn.Linear, scheme)
    unknown = sorted(tensors.keys() - set(names))
    missing = sorted((set(names) - set(ACTIVATION_NAMES) | _calibrated(scheme)) - tensors.keys())
    if unknown or missing:
        raise ValueError(f"expected the tensors {', '.join(names)}; lacking are {missing}, unknown are {unknown}")
    N, K = _sizes(tensors, scheme)
    codes = "weight_packed" if "weight_packed" in tensors else "weight"
    dtype, width = _codes(tensors, scheme, K)
    _expect(codes, tensors[codes], dtype, (N, width))
    _check_grid(tensors, scheme, N, K)
    return N, K


def _calibrated(scheme: QuantizationScheme) -> set[str]:
    """Names of what static inputs need."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return set()
    if inputs.dynamic:  # "local": the scale of all scales is static
        return {"input_global_scale"}
    return {"input_scale"} if inputs.symmetric else {"input_scale", "input_zero_point"}


def _sizes(tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> tuple[int, int]:
    if "weight_shape" in tensors:
        N, K = (int(size) for size in tensors["weight_shape"])
        return N, K
    codes = tensors.get("weight", tensors.get("weight_packed"))
    assert codes is not None
    N, width = codes.shape
    return N, width if "weight" in tensors else width * 8 // scheme.weights.num_bits


def _codes(tensors: Mapping[str, Tensor], scheme: QuantizationScheme, K: int) -> tuple[torch.dtype, int]:
    """Dtype and columns of the codes."""
    bits = scheme.weights.num_bits
    if "weight_shape" in tensors:
        return torch.int32, -(-K * bits // 32)
    if "weight_packed" in tensors:
        return torch.uint8, K * bits // 8
    return (torch.int8 if scheme.weights.type == "int" else torch.float8_e4m3fn), K


def _check_grid(tensors: Mapping[str, Tensor], scheme: QuantizationScheme, N: int, K: int) -> None:
    weights = scheme.weights
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if weights.strategy == "block":
        rows, columns = weights.block_structure or (1, 1)
        expected: tuple[int, ...] = (-(-N // rows), -(-K // columns))
    else:
        G = K // weights.group_size if weights.group_size and weights.strategy != "channel" else 1
        expected = (1,) if weights.strategy == "tensor" else (N, G)
    if tuple(scale.shape) != expected:
        raise ValueError(f"expected weight_scale {expected} of strategy {weights.strategy}, got {tuple(scale.shape)}")
    if zero is not None and "weight_shape" in tensors:
        _expect("weight_zero_point", zero, torch.int32, (-(-N * weights.num_bits // 32), scale.shape[-1]))


def _expect(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise ValueError(f"expected {name} {dtype} {shape}, got {value.dtype} {tuple(value.shape)}")
