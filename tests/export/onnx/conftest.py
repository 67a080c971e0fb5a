"""Small models, schemes that ONNX expresses, and what a file holds."""

import pytest
import torch
from torch import nn

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


@pytest.fixture(scope="session")
def static8():
    """``static8(symmetric=False, targets=...)``: config_groups with int8 weights (``even``) and static inputs."""

    def groups(symmetric=False, targets=("Linear", "Conv2d"), even=True, **weights):
        inputs, weights = {**INPUTS, "symmetric": symmetric}, {**WEIGHTS, **weights, "symmetric": even}
        return {"all": {"targets": [*targets], "weights": weights, "input_activations": inputs}}

    return groups


@pytest.fixture(scope="session")
def cnn():
    """``cnn()``: two convolutions with BatchNorm, a pooling, two Linears."""

    def build():
        torch.manual_seed(0)
        stages = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        stages += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        net = nn.Sequential(*stages, nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
        for norm in (net[1], net[5]):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            norm.num_batches_tracked.fill_(1)
        return net.eval()

    return build


@pytest.fixture(scope="session")
def constants():
    """``constants(folder)``: the initializers of model.onnx as tensors, INT4 as int8."""
    import numpy as np
    import onnx

    def read(folder):
        graph = onnx.load(folder / "model.onnx").graph
        arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
        return {
            name: torch.from_numpy(array.astype(np.int8) if array.dtype.name == "int4" else array.copy())
            for name, array in arrays.items()
        }

    return read


@pytest.fixture(scope="session")
def fused():
    """``fused(file)``: the operators of the file after ONNX Runtime's optimization for this CPU."""
    import onnx
    import onnxruntime

    def operators(file):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(file.with_suffix(".optimized"))
        onnxruntime.InferenceSession(str(file), options)
        return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]

    return operators
