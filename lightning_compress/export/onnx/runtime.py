"""An ONNX file in ONNX Runtime on the CPU: extremes of values on a sample, and the distance from the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "difference", "extremes", "outputs_of"]

TOLERANCE = 0.02  # of an output's norm: codes of inputs that lie between two points round either way


def outputs_of(file: Path | bytes, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ONNX Runtime computes from a file, by the names of the outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32, not int8, inputs
    source = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}  # an input that the model does not use is not in the file
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items() if name in wanted}
    names = [entry.name for entry in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, feed), strict=True)}


def extremes(model: Any, names: list[str], inputs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest number of values inside of a model (``onnx_ir.Model``), by name."""
    import onnx_ir as ir

    observed = ir.serde.deserialize_model(ir.serde.serialize_model(model))  # a copy
    values = {value.name: value for node in observed.graph for value in node.outputs}
    observed.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if not values[name].is_graph_output())
    outputs = outputs_of(ir.serde.serialize_model(observed).SerializeToString(), inputs)
    return {name: (float(outputs[name].min()), float(outputs[name].max())) for name in names}


def difference(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest distance between outputs, relative to their norm, and the name of that output.

    Of integers: the share that differs. Numbers that are not finite in the expected output must be the same.
    """
    gaps = {name: _gap(outputs[name], value.detach().cpu()) for name, value in expected.items()}
    name = max(gaps, key=lambda key: gaps[key])
    return gaps[name], name


def _gap(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((value != expected).double().mean()) if value.numel() else 0.0
    finite = expected.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return float("inf")
    value, expected = value[finite].double(), expected[finite].double()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0
