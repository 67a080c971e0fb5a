import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from lightning_compress import FoldBatchNormModifier, QuantizationModifier, compress
from lightning_compress.export.onnx.graph import constant, mend_graph
from lightning_compress.export.onnx.modules import codes_of, with_codes
from lightning_compress.export.onnx.program import Function, trace
from lightning_compress.export.onnx.sample import call_of


def graph_of(model, x, narrow=frozenset()):
    with torch.no_grad(), with_codes(model, codes_of(model)):
        graph = trace(Function(model, call_of(model, x)), 21 if narrow else None).model.graph
    mend_graph(graph, set(narrow))
    return graph


def test_the_shift_of_a_folded_norm_is_in_the_bias(cnn, static8):
    """The bias of int32 codes: b + shift, on the grid s_x s_w, to half a step."""
    model, x = cnn(), torch.randn(4, 1, 8, 8)
    compress(model, [FoldBatchNormModifier(), QuantizationModifier(config_groups=static8())], [x])
    graph = graph_of(model, x)
    assert "BatchNormalization" not in {node.op_type for node in graph}
    names, constants = {*graph.initializers}, graph.initializers
    assert not {name for name in names if name.startswith(("1.", "5."))}
    norm = model[5]
    expected = (model[4].bias + norm.bias - norm.running_mean).detach().numpy()
    codes, scale = constant(constants["4.bias_codes"]), constant(constants["4.bias_scale"])
    assert codes.dtype == np.int32
    assert (np.abs(codes * scale - expected) <= 0.51 * scale).all()
    inputs = constant(constants["4.input_scale"]) * constant(constants["4.weight_scale"])
    assert np.array_equal(scale, inputs)


def test_a_norm_that_is_not_folded_stays(cnn, static8):
    model, x = cnn(), torch.randn(4, 1, 8, 8)
    compress(model, QuantizationModifier(config_groups=static8()), [x])
    assert [node.op_type for node in graph_of(model, x)].count("BatchNormalization") == 2


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 8, bias=False), nn.Linear(32, 8)

    def forward(self, x):
        return self.q(x) + self.k(x)


def test_each_matmul_has_a_quantizer_of_its_own(static8):
    model, x = Pair().eval(), torch.randn(4, 5, 32)
    compress(
        model,
        QuantizationModifier(config_groups=static8(targets=["Linear"], num_bits=4, strategy="tensor", even=False)),
        [x],
    )
    graph = graph_of(model, x, {"q.weight", "k.weight"})
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert sorted([value.name for value in node.inputs] for node in quantizers) == [
        ["x", "k.input_scale", "k.input_zero_point"],
        ["x", "q.input_scale", "q.input_zero_point"],
    ]
    kinds = {name: value.dtype for name, value in graph.initializers.items() if "weight" in name or "zero" in name}
    narrow = {name: kind for name, kind in kinds.items() if name.endswith((".weight", "weight_zero_point"))}
    assert {*narrow.values()} == {ir.DataType.INT4}
    assert kinds["q.input_zero_point"] == kinds["k.input_zero_point"] == ir.DataType.INT8


@pytest.mark.parametrize("magnitude", [1e3, 1e9])
def test_a_bias_that_does_not_fit_stays_float(static8, magnitude):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1)).eval(), torch.randn(4, 1, 3, 3)
    with torch.no_grad():
        model[0].bias.fill_(magnitude)
    compress(model, QuantizationModifier(config_groups=static8(targets=["Conv2d"])), [x])
    assert ("0.bias_codes" in graph_of(model, x).initializers) == (magnitude == 1e3)
