"""A model that is pruned and then quantized, in one recipe or in two, is pruned and quantized in the end."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    GPTQModifier,
    QuantizationModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    compress,
    load,
    save,
)
from lightning_compress.layerwise.factor import factorize
from lightning_compress.modifiers.gptq.solver import round_columns
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import minmax
from tests.support.pruning_runs import kept_per_group, problem
from tests.support.quantization_runs import correlated

SYMMETRIC = {"scheme": "W4A16", "group_size": 32}
ASYMMETRIC = {"scheme": "W4A16_ASYM", "group_size": 32}
GRIDS = [pytest.param(SYMMETRIC, id="symmetric"), pytest.param(ASYMMETRIC, id="asymmetric")]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)]
    for block in blocks:
        for linear in block[::2]:
            nn.init.normal_(linear.weight, mean=0.05, std=0.1)  # off-centre: zero points are not 0
    return nn.Sequential(*blocks)


def data() -> list[torch.Tensor]:
    return [correlated(128, 32, i) for i in range(3)]


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("walk", ["auto", "one_pass", "two_pass", "whole"])
@pytest.mark.parametrize("grid", GRIDS)
def test_two_of_four_stays_through_gptq_export_and_load(tmp_path, grid, walk):
    model = network()
    ledger = compress(model, [SparseGPTModifier(mask_structure="2:4"), GPTQModifier(**grid)], data(), walk=walk)
    assert len(Quantized.find(model)) == 4
    assert [row.technique for row in ledger].count("sparsegpt") == 4
    assert {row.sparsity for row in ledger if row.technique == "sparsegpt"} == {0.5}
    assert all(row.sparsity >= 0.5 for row in ledger if row.technique == "gptq")
    assert all((kept_per_group(m.weight, 4) <= 2).all() for m in linears(model))
    restored = load(save(model, tmp_path / "compressed"), network(1))
    for ours, theirs in zip(linears(restored), linears(model), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert (kept_per_group(ours.weight, 4) <= 2).all()


@pytest.mark.parametrize("quantizer", [GPTQModifier, QuantizationModifier])
@pytest.mark.parametrize("pruner", [SparseGPTModifier, WandaPruningModifier])
@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_of_an_earlier_run_stay(grid, pruner, quantizer):
    model = network()
    compress(model, pruner(sparsity=0.6), data())
    zeros = [m.weight == 0 for m in linears(model)]
    compress(model, quantizer(**grid), data())
    assert all((m.weight[zero] == 0).all() for m, zero in zip(linears(model), zeros, strict=True))


def test_the_quantizer_sees_the_block_pruned():
    """Its error is measured against the pruned weight: small beside what pruning cost."""
    model, seen = network(), {}

    class Witness(GPTQModifier):
        def on_module_ready(self, state, event, **kwargs):
            seen.update({n: (m.weight == 0).float().mean().item() for n, m in state.modules.items() if n[-1] in "02"})
            super().on_module_ready(state, event, **kwargs)

    compress(model, [SparseGPTModifier(mask_structure="2:4"), Witness(**SYMMETRIC)], data(), walk="one_pass")
    assert seen == dict.fromkeys(["0.0", "0.2", "1.0", "1.2"], 0.5)


def test_only_the_last_stage_goes_in_lockstep():
    ready: list[str] = []

    class Pruner(SparseGPTModifier):
        def on_module_ready(self, state, event, **kwargs):
            ready.extend(state.modules)

    model = network()
    compress(model, [Pruner(), GPTQModifier(**SYMMETRIC)], data(), walk="one_pass")
    assert ready == []
    assert all((m.weight == 0).float().mean() >= 0.5 for m in linears(model))
    alone = network()
    compress(alone, Pruner(), data(), walk="one_pass")
    assert {name for name in ready if name[-1] in "02"} >= {"0.0", "1.2"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_size", [True, False])
def test_columns_still_to_come_make_up_for_zeros(by_size, symmetric):
    """With a grid so fine that nothing is lost by rounding, what is left is optimal brain surgeon on the mask."""
    W, H = problem(6, 32)
    keep = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) > 0.4
    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=symmetric)
    factor = factorize(H, 0.01, by_size)
    damped = H + torch.diag(factor.added_C)
    scale, zero = minmax(W, args)
    Q, free = round_columns(W, scale / 64, None if zero is None else zero * 0, args, factor, 8, None, keep)
    assert (Q[~keep] == 0).all()
    assert_close(free, (((W - Q) @ damped) * (W - Q)).sum(1))
    fine, _ = round_columns(W, scale, zero, args, factor, 32, None, keep)
    plain = (W * keep - W) @ damped
    assert ((((W - fine) @ damped) * (W - fine)).sum(1) < (plain * (W * keep - W)).sum(1)).all()


def test_preserve_zeros_may_be_demanded_or_declined():
    def zeros(share: float, preserve: bool | None) -> bool:
        model = nn.Sequential(network()[0])
        linear = model[0][0]
        with torch.no_grad():
            linear.weight[torch.rand(linear.weight.shape) < share] = 0
        gone = linear.weight == 0
        compress(model, GPTQModifier(**SYMMETRIC, preserve_zeros=preserve, targets=["0.0"]), data())
        return bool((linear.weight[gone] == 0).all())

    assert [zeros(0.1, None), zeros(0.1, True)] == [False, True]
    assert [zeros(0.5, None), zeros(0.5, False)] == [True, False]
