import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.export.onnx.graph import constant, mend_graph
from lightning_compress.export.onnx.modules import codes_of, with_codes
from lightning_compress.export.onnx.output_grids import add_grids, open_outputs, round_before_relu
from lightning_compress.export.onnx.program import Function, trace
from lightning_compress.export.onnx.runtime import outputs_of
from lightning_compress.export.onnx.sample import call_of


def program_of(model, x):
    with torch.no_grad(), with_codes(model, codes_of(model)):
        program = trace(Function(model, call_of(model, x)), None)
    mend_graph(program.model.graph, set())
    return program


def two(static8, symmetric):
    torch.manual_seed(0)
    stages = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.SiLU()]
    model, x = nn.Sequential(*stages).eval(), torch.randn(8, 1, 8, 8)
    compress(model, QuantizationModifier(config_groups=static8(symmetric=symmetric, targets=["Conv2d"])), [x])
    return model, x


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_rounded_before_a_relu_and_outputs_stay_equal(static8, symmetric, tmp_path, fused):
    model, x = two(static8, symmetric)
    program = program_of(model, x)
    program.save(tmp_path / "before.onnx")
    round_before_relu(program.model.graph)
    program.save(tmp_path / "after.onnx")
    before, after = (outputs_of(tmp_path / name, {"input": x}) for name in ("before.onnx", "after.onnx"))
    assert torch.allclose(before["output"], after["output"], rtol=0, atol=1e-6)
    assert fused(tmp_path / "after.onnx").count("QLinearConv") == 1
    assert ((tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()) != symmetric


def test_the_extremes_of_a_sample_give_a_grid(static8):
    """Scaled by what the sample lacks of the range of inputs that calibration saw."""
    model, x = two(static8, False)
    graph = program_of(model, x).model.graph
    ((name, (node, _)),) = open_outputs(graph).items()
    scale, zero = (constant(value) for value in node.inputs[0].producer().inputs[1:])
    largest = float(scale) * (127 - int(zero))
    source = str(node.inputs[0].name)
    assert add_grids(graph, lambda names: {name: (-1.0, 3.0), source: (0.0, largest / 2)}) == [name]
    step, zero = constant(graph.initializers[f"{name}_scale"]), constant(graph.initializers[f"{name}_zero_point"])
    assert np.isclose(step, 2 * 4 / 255)
    assert zero.dtype == np.int8
    assert zero == round(-128 + 2 / float(step))
    assert not open_outputs(graph)
    assert add_grids(graph, lambda names: {}) == []
