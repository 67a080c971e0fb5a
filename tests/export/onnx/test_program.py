import warnings

import pytest
import torch
from torch import nn

from lightning_compress.export.onnx.program import Function, trace
from lightning_compress.export.onnx.sample import call_of


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return {"y": self.layer(x).reshape(3, 4), "none": None, "pair": (x * scale, x.sum(1))}


class Branching(Fixed):
    def forward(self, x):
        return x if float(x.sum()) > 0 else self.layer(x)


def test_a_fixed_batch_is_said():
    model = Fixed().eval()
    function = Function(model, call_of(model, {"x": torch.randn(3, 4), "scale": 2.0}))
    with pytest.warns(UserWarning, match="the file cannot have a varying batch: "):
        graph = trace(function, None).model.graph
    assert [(value.name, [*value.shape]) for value in graph.inputs] == [("x", [3, 4])]
    assert [value.name for value in graph.outputs] == ["y", "pair_0", "pair_1"]


def test_dimensions_have_names():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = trace(Function(model, call_of(model, torch.randn(3, 7, 4))), None).model.graph
    assert [str(dim) for dim in graph.inputs[0].shape] == ["batch", "7", "4"]
    assert [str(dim) for dim in graph.outputs[0].shape] == ["batch", "7", "4"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_does_not_trace_is_named():
    model = Branching()
    with pytest.raises(ValueError, match="torch.export cannot trace this Branching on the sample: "):
        trace(Function(model, call_of(model, torch.randn(3, 4))), None)
