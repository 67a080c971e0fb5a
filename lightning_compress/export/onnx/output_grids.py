"""Grids for the outputs of integer convolutions that no layer after them gives one.

ONNX Runtime computes a convolution in integers only if its output is quantized too. The inputs of the next layer say on
which grid, except before a pooling, an addition, a norm or the end of the model. There the extremes of the output on
a sample give one, int8, asymmetric. Where the sample stays below the range of inputs that calibration saw, its extremes
are scaled up by as much. On a ReLU, codes of a symmetric grid are rounded before it, which gives the same codes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightning_compress.export.onnx.graph import constant, initializer, integer_convolutions, quantize_pair

__all__ = ["Extremes", "add_grids", "open_outputs", "round_before_relu"]

Extremes = Mapping[str, tuple[float, float]]
COMMUTING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
LOWEST = -128


def round_before_relu(graph: Any) -> None:
    """Round the output of each integer convolution before its ReLU where the grid after it has negative codes."""
    for node in integer_convolutions(graph):
        relu = _only_reader(node.outputs[0])
        if relu is None or relu.op_type != "Relu":
            continue
        grids = _grids_after(relu.outputs[0])
        if grids is not None and len(grids) == 1 and (grid := next(iter(grids.values())))[2] != LOWEST:
            quantize_pair(graph, node.outputs[0], *grid[:2])


def open_outputs(graph: Any) -> dict[str, Any]:
    """Outputs of integer convolutions, after their ReLU, that no single grid rounds, by name."""
    values = {}
    for node in integer_convolutions(graph):
        value, reader = node.outputs[0], _only_reader(node.outputs[0])
        if reader is not None and reader.op_type == "Relu":
            value = reader.outputs[0]
        grids = _grids_after(value)
        if grids is None or len(grids) != 1:
            values[str(value.name)] = (node, value)
    return values


def add_grids(graph: Any, observe: Callable[[list[str]], Extremes]) -> list[str]:
    """Quantize the outputs that have no grid; returns their names.

    Args:
        graph: Changed in place.
        observe: Gives the extremes of values of the graph on a sample, by name.
    """
    values = open_outputs(graph)
    if not values:
        return []
    seen = observe([*values, *(str(node.inputs[0].name) for node, _ in values.values())])
    for name, (node, value) in values.items():
        reach = _reach(node, seen[str(node.inputs[0].name)])
        low, high = (min(0.0, seen[name][0]) / reach, max(0.0, seen[name][1]) / reach)
        scale = np.float32((high - low) / 255 or 1.0)
        zero = np.int8(np.clip(round(LOWEST - low / float(scale)), LOWEST, 127))
        quantize_pair(
            graph,
            value,
            initializer(graph, f"{name}_scale", np.array(scale)),
            initializer(graph, f"{name}_zero_point", np.array(zero)),
        )
    return list(values)


def _reach(node: Any, extremes: tuple[float, float]) -> float:
    """The largest input of a convolution on the sample, as a share of the largest that its grid holds; at most 1."""
    scale, zero = (constant(value) for value in node.inputs[0].producer().inputs[1:])
    if scale is None or zero is None:
        return 1.0
    largest = float(scale) * max(127 - int(zero), int(zero) - LOWEST)
    return min(1.0, max(map(abs, extremes)) / largest) or 1.0


def _only_reader(value: Any) -> Any:
    """The node that alone reads a value; None where several do, or where the value is an output of the model."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _grids_after(value: Any) -> dict[Any, tuple[Any, Any, int]] | None:
    """The grids on which a value is read, past nodes that commute with rounding; None where one reader has none."""
    grids: dict[Any, tuple[Any, Any, int]] = {}
    if value.is_graph_output():
        return None
    for node, place in value.uses():
        if node.op_type == "QuantizeLinear":
            scale, zero = (constant(operand) for operand in node.inputs[1:])
            if scale is None or zero is None:
                return None
            grids[(scale.tobytes(), zero.tobytes())] = (*node.inputs[1:], int(zero))
        elif node.op_type in COMMUTING and place == 0:
            after = _grids_after(node.outputs[0])
            if after is None:
                return None
            grids |= after
        else:
            return None
    return grids
