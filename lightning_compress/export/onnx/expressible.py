"""Which quantization ONNX has nodes for, and what is missing before a file can be written.

QuantizeLinear, DequantizeLinear    int8 since opset 13, by tensor or by channel
DequantizeLinear with block_size    int4 and int8 in groups of columns, opset 21
DynamicQuantizeLinear               one scale for all of a tensor: neither per token nor per row
"""

from collections.abc import Mapping
from importlib.util import find_spec

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from torch import nn

from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized

__all__ = ["check_model", "check_packages", "check_schemes", "fault_of"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
STATIC = (
    "take static inputs with one scale for each tensor (dynamic: false, strategy: tensor), or weights alone (W8A16)"
)
GRAINS = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)


def check_packages() -> None:
    """ValueError names the packages that writing ONNX needs and that are not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"the format 'onnx' needs packages that are not installed ({', '.join(missing)}): pip install "
            f"'lightning-compress[onnx]'"
        )


def check_schemes(schemes: Mapping[str, QuantizationScheme]) -> None:
    """ValueError names the first module, of those of a recipe, whose scheme ONNX cannot express."""
    for name, scheme in schemes.items():
        if fault := fault_of(scheme):
            raise ValueError(f"{name!r} cannot be written as ONNX: {fault}")


def check_model(model: nn.Module) -> None:
    """ValueError names what a compressed model holds that ONNX cannot express."""
    records = Quantized.find(model)
    check_schemes({clean_name(name): record.scheme for name, (_, record) in records.items()})
    if experts := [name for name, (module, _) in records.items() if isinstance(module, ExpertLinear)]:
        raise ValueError(
            f"{shortlist(map(clean_name, experts))} are experts in one tensor, which is not written as ONNX; leave "
            f"them out (ignore), or export the format 'compressed_tensors'"
        )
    if caches := list(QuantizedCache.find(model)):
        raise ValueError(
            f"the KV cache of {shortlist(map(clean_name, caches))} is quantized, and an ONNX file has no cache; leave "
            f"KVCacheModifier out, or export the format 'compressed_tensors'"
        )


def fault_of(scheme: QuantizationScheme) -> str:
    """Why ONNX cannot express a scheme, and what to take instead; empty where it can."""
    weights, inputs = scheme.weights, scheme.input_activations
    if scheme.output_activations is not None:
        return f"its scheme quantizes outputs; {STATIC}"
    if weights is None or weights.type != "int" or weights.num_bits > 8:
        kind = "missing" if weights is None else f"{weights.num_bits}-bit {weights.type}s"
        return f"its weights are {kind}, and runtimes have kernels for integers of 4 and 8 bits; take int8 or int4"
    if weights.strategy not in GRAINS:
        grain = QuantizationStrategy(weights.strategy).value
        return f"its weights have scales by {grain}, expected tensor, channel or group"
    return "" if inputs is None else _fault_of_inputs(inputs)


def _fault_of_inputs(inputs: QuantizationArgs) -> str:
    if inputs.type != "int" or inputs.num_bits != 8:
        return f"its inputs are {inputs.num_bits}-bit {inputs.type}s, expected 8-bit integers; {STATIC}"
    if inputs.dynamic:
        return (
            f"its inputs have scales by {QuantizationStrategy(inputs.strategy).value} that follow the data, and "
            f"DynamicQuantizeLinear has one scale for all of a batch, so that outputs would differ; {STATIC}"
        )
    if inputs.strategy != QuantizationStrategy.TENSOR:
        return f"its inputs have scales by {QuantizationStrategy(inputs.strategy).value}; {STATIC}"
    return ""
