"""Linears that are quantized by every kind of scheme, for tests of packed ones."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from torch import nn

from lightning_compress.quant.observers import make_observer
from lightning_compress.quant.rounding import round_module

INPUTS = {
    "token": {"strategy": "token", "dynamic": True},
    "token-asymmetric": {"strategy": "token", "dynamic": True, "symmetric": False},
    "static": {"strategy": "tensor"},
    "static-asymmetric": {"strategy": "tensor", "symmetric": False},
}
WEIGHTS = {
    "g32": {"group_size": 32},
    "g32-asymmetric": {"group_size": 32, "symmetric": False},
    "g64": {"group_size": 64},
    "channel": {},
    "channel-asymmetric": {"symmetric": False},
    "tensor": {"strategy": "tensor"},
}
INT4 = list(WEIGHTS)
PRESETS = ["FP8", "FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP6A16", "MXFP8"]
PRESETS += ["W4A8 g64", "W4AFP8 g64"]
INTEGERS = [f"w{bits} {grid}" for bits in (2, 3, 5, 8) for grid in ("g32", "channel-asymmetric")]
INT8 = [f"w8a8 {inputs}" for inputs in INPUTS]
SCHEMES = [*(f"w4 {grid}" for grid in WEIGHTS), *INTEGERS, "w8 channel", *INT8, *PRESETS]
SHAPES = [(16, 64), (17, 192), (1, 64)]  # N, K
COLUMNS = 64


def scheme_named(name):
    """``w4 g32``, ``w8a8 token``, ``FP8`` or ``W4A8 g64``."""
    first, _, rest = name.partition(" ")
    if first.startswith("w"):
        bits = int(first[1])
        inputs = QuantizationArgs(num_bits=8, **INPUTS[rest]) if "a" in first else None
        grid = {} if inputs is not None else WEIGHTS[rest]
        strategy = "group" if "group_size" in grid else "channel"
        weights = QuantizationArgs(num_bits=bits, **({"strategy": strategy} | grid))
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    scheme = preset_name_to_scheme(first, ["Linear"])
    if rest:
        scheme.weights.group_size = int(rest[1:])
    return scheme


def quantized_linear(name, N=16, K=COLUMNS, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(N + K + seed)
    linear, scheme = nn.Linear(K, N, bias, dtype=dtype), scheme_named(name)
    inputs, observer = scheme.input_activations, None
    if inputs is not None and inputs.dynamic is not True:
        observer = make_observer("minmax", inputs, 0.0)
        observer.update(torch.randn(4, 8, K, dtype=dtype))
    round_module("layer", linear, scheme, "minmax", observer)
    return linear


def tokens(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
