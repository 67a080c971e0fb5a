"""Rounding in one pass, which GPUs take, is rounding step by step, bit for bit; it is taken only where it is that."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

from lightning_compress.ops import group_quant
from lightning_compress.quant import fake_quant, rounding, scales
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import minmax

FITTING = [
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8},
    {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
]


@pytest.mark.parametrize("grid", FITTING, ids=lambda grid: "-".join(map(str, grid.values())))
def test_one_pass_is_step_by_step(grid):
    args = QuantizationArgs(**grid)
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.randn(6, 24).to(dtype)
        assert rounding.has_one_pass(W, args)
        value, scale, zero = rounding.round_in_one_pass(W, args)
        expected = minmax(W, args)
        assert torch.equal(value, round_weight(W, *expected, args))
        assert torch.equal(scale, expected[0])
        assert zero is expected[1] is None or torch.equal(zero, expected[1])


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(num_bits=8, strategy="tensor"),
        QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[4, 4]),
        preset_name_to_scheme("NVFP4", ["Linear"]).weights,
        preset_name_to_scheme("MXFP4", ["Linear"]).weights,
    ],
    ids=lambda args: f"{args.type}{args.num_bits}-{args.strategy}",
)
def test_other_grids_go_step_by_step(args):
    assert not rounding.has_one_pass(torch.randn(8, 64), args)
    assert not rounding.has_one_pass(torch.randn(8, 64).double(), QuantizationArgs(**FITTING[0]))


def test_a_module_on_a_gpu_is_rounded_in_one_pass(monkeypatch):
    """A GPU is played by a weight that says it is on one; min-max scales alone take the pass."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    calls = []

    def spied(*arguments):
        calls.append(arguments)
        return group_quant.group_round(*arguments)

    monkeypatch.setattr(rounding, "group_round", spied)
    monkeypatch.setattr(group_quant, "kernel_runs", lambda *_: False)
    monkeypatch.setattr(scales, "kernel_runs", lambda *_: False)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**FITTING[0]))
    for search, count in (("minmax", 1), ("mse", 1)):
        plain, played = torch.nn.Linear(24, 6), torch.nn.Linear(24, 6)
        played.load_state_dict(plain.state_dict())
        monkeypatch.setattr(rounding, "as_matrix", lambda module: module.weight.detach())
        rounding.round_module("layer", plain, scheme, search)
        monkeypatch.setattr(rounding, "as_matrix", lambda module: module.weight.detach().as_subclass(OnGPU))
        rounding.round_module("layer", played, scheme, search)
        assert torch.equal(played.weight, plain.weight)
        assert torch.equal(Quantized.of(played).scale.as_subclass(torch.Tensor), Quantized.of(plain).scale)
        assert len(calls) == count


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_in_pieces_of_rows_is_rounding_at_once(preset, dtype, monkeypatch):
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    W_RC = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = minmax(W_RC, args, torch.tensor([7.0]) if preset == "NVFP4A16" else None)
    at_once = round_weight(W_RC, scale, zero_point, args)
    monkeypatch.setattr(fake_quant, "CACHED", 4 * 256)
    assert torch.equal(round_weight(W_RC, scale, zero_point, args), at_once)
    transposed = round_weight(W_RC.t().contiguous().t(), scale, zero_point, args)
    assert torch.equal(transposed, at_once)
