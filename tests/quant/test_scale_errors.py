"""Scales by the whole H of a group: against its definition, against brute force, and what it is good for."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.layerwise.input_hessian import InputHessian, groups_as_partitions
from lightning_compress.quant import scales
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scale_errors import FormErrors, GridErrors
from lightning_compress.quant.scales import minmax, search

STRATEGIES = {"group": {"group_size": 16}, "channel": {"strategy": "channel"}, "tensor": {"strategy": "tensor"}}
GRIDS = {
    f"{bits} bits {name} {'sym' if symmetric else 'asym'}": QuantizationArgs(num_bits=bits, symmetric=symmetric, **args)
    for bits in (2, 3, 4, 8)
    for name, args in STRATEGIES.items()
    for symmetric in (True, False)
} | {
    "fp8": QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    "fp8 block": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[5, 24]),
    "nvfp4": QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    ),
    "mxfp4": QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
}


def made(tokens: int, rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The generator of the layer-level bars: latent inputs and noise, every 37th channel large; heavy-tailed W."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 8, columns, generator=torch.Generator().manual_seed(99))
    X = torch.randn(tokens, columns // 8, generator=generator) @ mix / columns**0.5
    X = X + 0.3 * torch.randn(tokens, columns, generator=generator)
    X[:, ::37] *= 8
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    return W * (1 + W.abs()) / columns**0.5, X


def moments(X: Tensor, args: QuantizationArgs) -> Tensor:
    """[G, g, g] by its definition."""
    g = scales.group_columns(args, X.shape[1])
    padded = torch.nn.functional.pad(X, (0, -X.shape[1] % g)).double()
    return torch.stack([x.t() @ x / len(x) for x in padded.split(g, 1)]).float()


def losses(W: Tensor, found: tuple[Tensor, Tensor | None], args: QuantizationArgs, H: Tensor) -> Tensor:
    """e H e^T of whatever shares a scale, summed, [R, G], [blocks] or [1]."""
    E = (round_weight(W, *found, args) - W).double()
    g = scales.group_columns(args, W.shape[1])
    E = torch.nn.functional.pad(E, (0, -W.shape[1] % g))
    each = torch.stack([((e @ h.double()) * e).sum(1) for e, h in zip(E.split(g, 1), H, strict=True)], 1)
    if args.strategy == "block":
        return torch.stack([rows.sum(0) for rows in each.split(args.block_structure[0])])
    return each.sum()[None] if args.strategy == "tensor" else each


@pytest.mark.parametrize("name", GRIDS)
def test_no_group_loses_more_than_with_the_extremes(name):
    args, (W, X) = GRIDS[name], made(300)
    H = moments(X, args)
    found, plain = search(W, args, H_Ggg=H), minmax(W, args)
    assert found[0].shape == plain[0].shape
    ours, theirs = losses(W, found, args, H), losses(W, plain, args, H)
    assert (ours <= theirs * (1 + 1e-4) + 1e-9).all()
    if args.num_bits <= 4:
        assert ours.sum() < 0.95 * theirs.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_comes_close_to_all_scales_tried(bits):
    args, (W, X) = QuantizationArgs(num_bits=bits, group_size=32), made(300, rows=32)
    H, scale = moments(X, args), minmax(W, args)[0]
    tried = torch.stack([losses(W, (scale * f, None), args, H) for f in torch.linspace(0.05, 1.6, 600).tolist()])
    ours = losses(W, search(W, args, H_Ggg=H), args, H)
    assert ours.sum() < 1.05 * tried.amin(0).sum()


def test_with_zero_points_it_comes_close_to_all_pairs_tried():
    args, (W, X) = QuantizationArgs(num_bits=3, symmetric=False, group_size=8), made(300, rows=8, columns=16)
    H, (scale, zero) = moments(X, args), minmax(W, args)
    tried = [
        losses(W, (scale * f, (zero + dz).clamp(-4, 3)), args, H)
        for f in torch.linspace(0.2, 1.4, 120).tolist()
        for dz in range(-3, 4)
    ]
    ours = losses(W, search(W, args, H_Ggg=H), args, H)
    assert ours.sum() < 1.25 * torch.stack(tried).amin(0).sum()
    assert ours.sum() < 0.8 * losses(W, (scale, zero), args, H).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_a_diagonal_it_is_the_error_by_importance(symmetric):
    """Three groups of 16 columns, 12 rows; factors by row, shifted zero points, and the fit behind them."""
    args = QuantizationArgs(num_bits=3, group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(0)
    t, h_Gg = 4 * torch.randn(3, 12, 16, generator=generator), torch.rand(3, 16, generator=generator)
    z = None if symmetric else torch.full((3, 12), -1.0)
    by_form = FormErrors(t, z, torch.diag_embed(h_Gg), args)
    by_column = GridErrors(t, z, h_Gg, 2.0, args)
    f_r, shift = 0.5 + torch.rand(36, generator=generator), torch.full((36,), 0.0 if symmetric else 1.0)
    assert_close(by_form(f_r, shift), by_column(f_r, shift))
    assert_close(by_form(0.7, 0.0), by_column(0.7, 0.0))
    assert_close(by_form.fit(f_r, shift), by_column.fit(f_r, shift))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_more_it_knows_of_the_inputs_the_less_is_lost_on_others(bits):
    args = QuantizationArgs(num_bits=bits, group_size=64)
    W, seen = made(4096, rows=64, columns=256)
    H, unseen = moments(seen, args), made(4096, rows=64, columns=256, seed=1)[1]

    def lost(found):
        return float(((round_weight(W, *found, args) - W) @ unseen.t()).square().sum())

    plain, diagonal, whole = minmax(W, args), search(W, args, seen.square().mean(0)), search(W, args, H_Ggg=H)
    assert lost(whole) < 0.97 * lost(diagonal)
    assert lost(diagonal) < 0.8 * lost(plain)


def test_groups_as_partitions_give_the_blocks_on_the_diagonal():
    X = torch.randn(2, 50, 10)
    stat = InputHessian(2 * 3, 4)
    for part in X.split([20, 30], 1):
        stat.update(groups_as_partitions(part, 4))
    for p in range(2):
        H = X[p].t() @ X[p] / 50
        for k, columns in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
            size = columns.stop - columns.start
            assert_close(stat.value()[3 * p + k, :size, :size], H[columns, columns])
    assert not stat.value()[[2, 5], 2:].any()  # what filled up the last group
