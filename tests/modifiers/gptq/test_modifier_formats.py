"""GPTQ on the grids of small floats and of blocks."""

import pytest
import torch

from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized
from tests.support.quantization_runs import attention, batches, calibrate, weights

FORMATS = ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"]
FP8 = {"num_bits": 8, "type": "float"}
BLOCK = {"g": {"targets": ["Linear"], "weights": {**FP8, "strategy": "block", "block_structure": [16, 32]}}}
GROUP = {"g": {"targets": ["Linear"], "weights": {**FP8, "strategy": "group", "group_size": 32}}}


def moments(data):
    """E[x x^T] of the input of q, k and v."""
    x = torch.cat(data).flatten(0, 1).double()
    return x.t() @ x / len(x)


def loss(model, before, H):
    """Hessian-weighted error of q, k and v."""
    D = torch.cat([before[f"{n}.weight"] - model.get_submodule(n).weight.detach() for n in "qkv"]).double()
    return float(((D @ H) * D).sum())


@pytest.mark.parametrize("scheme", [*FORMATS, BLOCK, GROUP], ids=["NVFP4", "MXFP4", "MXFP6", "MXFP8", "block", "group"])
def test_better_than_rounding_and_on_the_grid(scheme):
    data, arguments = batches(6), {"scheme": scheme} if isinstance(scheme, str) else {"config_groups": scheme}
    H, found = moments(data), {}
    for how in ("rtn", "minmax", "hessian"):
        model = attention()
        before = weights(model)
        rounding = {"rtn": QuantizationModifier, "minmax": GPTQModifier, "hessian": GPTQModifier}[how]
        options = {} if how == "rtn" else {"scale_search": how}
        calibrate(model, rounding(**arguments, **options, ignore=["spare"]), data)
        found[how] = loss(model, before, H)
        for name in "qkvo":
            record, W = Quantized.of(model.get_submodule(name)), model.get_submodule(name).weight
            assert torch.equal(round_weight(W, record.scale, record.zero_point, record.scheme.weights), W)
    assert found["minmax"] < 0.8 * found["rtn"]
    assert found["hessian"] < (0.95 if scheme == "NVFP4A16" else 1.05) * found["minmax"]


def test_nvfp4_with_activations_is_calibrated():
    model, data = attention(), batches(3)
    calibrate(model, GPTQModifier(scheme="NVFP4", ignore=["spare"]), data)
    record = Quantized.of(model.q)
    assert torch.equal(record.input_global_scale, 448 * 6 / torch.stack(data).abs().max()[None])
    shared = [Quantized.of(model.get_submodule(n)).global_scale for n in "qk"]
    assert shared[0] != shared[1]  # q and k alone are no names that servers fuse
    dense = torch.nn.functional.linear(data[0], model.q.weight, model.q.bias)
    assert 0.001 < (model.q(data[0]) - dense).norm() / dense.norm() < 0.2
