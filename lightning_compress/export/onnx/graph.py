"""The ONNX graph of torch's exporter, made into what runtimes compute in integers; but for biases values stay.

- The shift of a folded BatchNorm becomes the bias of the convolution before it (quant/batch_norm.py leaves it alone).
- The bias of a convolution with quantized inputs becomes int32 codes, with scale s_x * s_w: without it ONNX Runtime
  computes in float32. That moves a bias by at most s_x * s_w / 2.
- Each MatMul has a QuantizeLinear of its own.
- Codes of 4 bits are stored as INT4, and names are those of the model.

The graph is an ``onnx_ir.Graph``, onnxscript's.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["constant", "initializer", "integer_convolutions", "mend_graph", "quantize_pair", "source"]

PREFIX = "model."  # of names in program.Function
CONVOLUTIONS = ("Conv", "ConvTranspose")


def mend_graph(graph: Any, narrow: set[str]) -> None:
    """Change the graph in place; ``narrow`` are the names of initializers that are stored as INT4."""
    _rename(graph)
    for node in list(graph):
        node.metadata_props.clear()  # torch's hold paths of this machine
        for output in node.outputs:
            output.metadata_props.clear()
    _separate_quantizers(graph)
    for node in list(graph):
        if node.op_type == "BatchNormalization":
            _absorb_shift(graph, node)
    for node in integer_convolutions(graph):
        _quantize_bias(graph, node)
    for name in [name for name, value in graph.initializers.items() if not list(value.uses())]:
        del graph.initializers[name]
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0].name in narrow:
            _store_int4(graph, node)


def integer_convolutions(graph: Any) -> Iterator[Any]:
    """Convolutions of codes with codes; ONNX Runtime has none that are transposed."""
    for node in list(graph):
        if node.op_type == "Conv" and all(source(value) == "DequantizeLinear" for value in node.inputs[:2]):
            yield node


def source(value: Any) -> str:
    """The operator that computes a value; empty for inputs and constants."""
    producer = None if value is None else value.producer()
    return "" if producer is None else producer.op_type


def constant(value: Any) -> np.ndarray | None:
    """The numbers of a constant; None for what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def initializer(graph: Any, name: str, numbers: np.ndarray) -> Any:
    """A new constant of the graph."""
    import onnx_ir as ir

    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def quantize_pair(graph: Any, value: Any, scale: Any, zero: Any) -> None:
    """Let all that reads a value read it through QuantizeLinear and a DequantizeLinear of its own on this grid."""
    import onnx_ir as ir

    readers, name = list(value.uses()), value.name
    q = ir.node("QuantizeLinear", [value, scale, zero])
    q.outputs[0].name = f"{name}_quantized"
    graph.insert_after(value.producer(), [q])
    for number, (node, place) in enumerate(readers):
        dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
        dq.outputs[0].name = f"{name}_dequantized_{number}"
        dq.outputs[0].shape, dq.outputs[0].type = value.shape, value.type
        graph.insert_after(q, [dq])
        node.replace_input_with(place, dq.outputs[0])


def _rename(graph: Any) -> None:
    for name, value in list(graph.initializers.items()):
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in graph.initializers:
            value.name = name.removeprefix(PREFIX)
            if value.const_value is not None:
                value.const_value.name = value.name


def _separate_quantizers(graph: Any) -> None:
    """A QuantizeLinear for each MatMul, with constants of its own, where several such as q, k and v read one value.

    torch's exporter makes one of them, and ONNX Runtime 1.32 then computes all of them in float32.
    """
    import onnx_ir as ir

    pairs: dict[Any, tuple[Any, Any]] = {}
    for node in list(graph):
        dq = node.inputs[0].producer() if node.op_type == "MatMul" else None
        q = dq.inputs[0].producer() if dq is not None and dq.op_type == "DequantizeLinear" else None
        if q is not None and q.op_type == "QuantizeLinear":
            pairs[node] = (q, dq)
    shared = [q for q, count in Counter(q for q, _ in pairs.values()).items() if count > 1]
    for node, (q, dq) in pairs.items():
        if q not in shared:
            continue
        stem = _stem(node)
        names = [f"{stem}.input_scale", f"{stem}.input_zero_point"]
        grid = [_constant(graph, name, constant(v)) for v, name in zip(q.inputs[1:], names, strict=True)]
        again = ir.node("QuantizeLinear", [q.inputs[0], *grid])
        pair = [again, ir.node("DequantizeLinear", [again.outputs[0], *grid])]
        for new, old in zip(pair, (q, dq), strict=True):
            new.outputs[0].name = f"{stem}.{new.op_type}"
            new.outputs[0].shape, new.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
        graph.insert_before(node, pair)
        node.replace_input_with(0, pair[1].outputs[0])
    for place in (1, 0):  # DequantizeLinear first
        for old in {pair[place] for pair in pairs.values() if pair[0] in shared}:
            if not list(old.outputs[0].uses()):
                graph.remove(old, safe=True)


def _constant(graph: Any, name: str, numbers: np.ndarray | None) -> Any:
    """A constant of that name, which another node may have read under it before: then it gets another name."""
    if name in graph.initializers:
        other = graph.initializers.pop(name)
        other.name = f"{name}.shared"
        graph.register_initializer(other)
    assert numbers is not None
    return initializer(graph, name, numbers)


def _absorb_shift(graph: Any, norm: Any) -> None:
    """Add the shift of a norm that does nothing else to the bias of the convolution before it."""
    value, *parameters = norm.inputs
    numbers = [array for parameter in parameters if (array := constant(parameter)) is not None]
    layer = value.producer()
    if layer is None or layer.op_type not in CONVOLUTIONS or len(list(value.uses())) > 1 or len(numbers) < 4:
        return
    weight, bias, mean, variance = numbers
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gain = weight / np.sqrt(variance + epsilon)
    before = constant(layer.inputs[2]) if len(layer.inputs) > 2 else np.zeros_like(mean)
    if before is None or not np.allclose(gain, 1, rtol=0, atol=1e-6):
        return
    shifted = (before.astype(np.float64) + bias - mean).astype(mean.dtype)
    _set_bias(layer, initializer(graph, f"{_stem(layer)}.shifted_bias", shifted))
    norm.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(norm, safe=True)


def _quantize_bias(graph: Any, layer: Any) -> None:
    """DequantizeLinear of int32 codes in place of a float bias; where they do not fit into 32 bits, it stays."""
    import onnx_ir as ir

    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    grids = [constant(value.producer().inputs[1]) for value in layer.inputs[:2]]
    scales = [scale for scale in grids if scale is not None and scale.ndim < 2]
    if bias is None or len(scales) < 2:
        return
    scale = np.broadcast_to(scales[0].astype(np.float32) * scales[1], bias.shape).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale)
    if np.abs(codes).max(initial=0) >= 2**31:
        return
    stem = _stem(layer)
    operands = [
        initializer(graph, f"{stem}.bias_codes", codes.astype(np.int32)),
        initializer(graph, f"{stem}.bias_scale", scale),
    ]
    dq = ir.node("DequantizeLinear", operands, {"axis": 0})
    dq.outputs[0].name = f"{stem}.bias_dequantized"
    graph.insert_before(layer, [dq])
    _set_bias(layer, dq.outputs[0])


def _set_bias(layer: Any, bias: Any) -> None:
    layer.resize_inputs(3)
    layer.replace_input_with(2, bias)


def _stem(layer: Any) -> str:
    """The name of the module of a convolution or MatMul: that of its codes without ``.weight``."""
    weight = layer.inputs[1]
    while weight.producer() is not None:
        weight = weight.producer().inputs[0]
    return str(weight.name).removesuffix(".weight")


def _store_int4(graph: Any, dq: Any) -> None:
    """INT4 in place of int8 codes and zero points; a zero point that others read, too, is copied."""
    import onnx_ir as ir

    kind = ir.DataType.INT4
    for place in (0, 2) if len(dq.inputs) > 2 else (0,):
        value = dq.inputs[place]
        if value.dtype == kind:
            continue
        if place == 2 and any(other[1] != 2 for other in value.uses()):
            value = initializer(graph, f"{dq.inputs[0].name}_zero_point", value.const_value.numpy())
            dq.replace_input_with(2, value)
        numbers = value.const_value.numpy().astype(kind.numpy())
        value.const_value = ir.Tensor(numbers, dtype=kind, name=value.name)
        value.type = ir.TensorType(kind)
