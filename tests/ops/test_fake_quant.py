"""Values bit for bit those of compressed-tensors; gradients those of the reference and of finite differences."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.ops.fake_quant import (
    Codes,
    learned_step,
    learned_value,
    reference,
    relative_step,
    replace_value,
    straight_through,
)
from lightning_compress.quant.fake_quant import codes_of, round_weight
from lightning_compress.quant.scales import minmax

INTEGERS = [
    {"num_bits": bits, "type": "int", "symmetric": symmetric, **grain}
    for bits in range(2, 9)
    for symmetric in (True, False)
    for grain in ({"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 8})
]
FLOATS = [{"num_bits": 8, "type": "float", "symmetric": True, "strategy": s} for s in ("tensor", "channel")]
MICROSCALED = [
    preset_name_to_scheme(name, ["Linear"]).weights.model_dump()
    for name in ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")
]
FEW = [INTEGERS[i] for i in (0, 4, 5, 12, 17)] + FLOATS


def named(grid: dict[str, object]) -> str:
    return "-".join(str(v) for v in grid.values() if v is not None)


def case(grid, dtype=torch.float32, shrink=1.0, zeros=True):
    """A weight with (or without) a row of zeros, and an outlier; ``shrink`` below 1 makes part of it lie outside."""
    args = QuantizationArgs(**grid)
    columns = 2 * args.group_size if args.scale_dtype is not None else 24
    W_RC = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    W_RC[2] *= not zeros
    W_RC[3, 5] = 9.0
    W_RC = W_RC.to(dtype)
    scale, zero = minmax(W_RC, args)
    kept = torch.float32 if args.scale_dtype is not None else dtype
    return W_RC, (scale * shrink).to(kept), zero, codes_of(args), args


@pytest.mark.parametrize("grid", INTEGERS + FLOATS + MICROSCALED, ids=named)
def test_values_are_those_of_compressed_tensors(grid):
    for dtype in (torch.float32, torch.bfloat16):
        for shrink in (1.0, 0.6):
            *arguments, args = case(grid, dtype, shrink)
            W_RC, scale, zero = arguments[:3]
            expected = round_weight(W_RC, scale, zero, args)
            values = [straight_through(*arguments), learned_step(*arguments)]
            for value in [*values, reference.fake_quantize(*arguments[:3], *arguments[3])]:
                assert value.dtype == dtype
                assert torch.equal(value, expected)


@pytest.mark.parametrize("grid", FEW + MICROSCALED, ids=named)
def test_gradients_are_those_of_the_reference(grid):
    W_RC, scale, *rest, _ = case(grid, torch.float64, 0.6)
    scale = scale.double()
    gradient = torch.randn_like(W_RC)
    W_RC.requires_grad_()
    scale.requires_grad_()
    (g_W,) = torch.autograd.grad(straight_through(W_RC, scale, *rest), W_RC, gradient)
    at = (gradient, W_RC.detach(), scale.detach(), rest[0], *rest[1][:3])
    assert_close(g_W, reference.straight_through_gradient(*at), rtol=0, atol=0)
    result = torch.autograd.grad(learned_step(W_RC, scale, *rest), (W_RC, scale), gradient)
    expected = reference.learned_step_gradients(*at)
    assert_close(result[0], expected[0], rtol=0, atol=0)
    assert_close(result[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", FEW, ids=named)
def test_gradients_are_finite_differences_of_the_surrogate(grid):
    """Rounding is replaced by adding the error that it makes here and now; the rest is differentiated numerically."""
    W_RC, scale, zero, codes, _ = case(grid, torch.float64, 0.6, zeros=False)
    low, high, float_bits, _ = codes
    gradient = torch.randn_like(W_RC)

    def expanded(t: Tensor) -> Tensor:
        return t.expand(6, -1).repeat_interleave(24 // t.shape[-1], 1)

    z_RC = expanded(torch.zeros_like(scale) if zero is None else zero.double())
    v_RC = W_RC / expanded(scale) + z_RC
    rounded = v_RC.float().to(torch.float8_e4m3fn).double() if float_bits else v_RC.round()
    error_RC = rounded - v_RC

    def surrogate(W: Tensor, s: Tensor) -> Tensor:
        v = W / expanded(s) + z_RC
        moved = torch.where(v <= low, low, torch.where(v >= high, high, v + error_RC))
        return ((moved - z_RC) * expanded(s) * gradient).sum()

    def difference(at: Tensor, f) -> Tensor:
        slope = torch.zeros_like(at)
        for i in range(at.numel()):
            step = torch.zeros_like(at).view(-1)
            step[i] = 1e-6
            step = step.view(at.shape)
            slope.view(-1)[i] = (f(at + step) - f(at - step)) / 2e-6
        return slope

    away = ((v_RC - low).abs() > 1e-3) & ((v_RC - high).abs() > 1e-3)  # a kink has no derivative
    W, s = W_RC.clone().requires_grad_(), scale.clone().requires_grad_()
    g_W, g_s = torch.autograd.grad(learned_step(W, s, zero, codes), (W, s), gradient)
    assert_close(g_W[away], difference(W_RC, lambda w: surrogate(w, scale))[away], rtol=1e-5, atol=1e-6)
    expected = difference(scale, lambda t: surrogate(W_RC, t)) / (W_RC.numel() / scale.numel() * high) ** 0.5
    assert_close(g_s, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [g for g in FEW if g["strategy"] == "tensor"], ids=named)
def test_an_activation_has_the_gradients_of_a_weight_but_for_the_count(grid):
    """Those are finite differences of the surrogate; the paper divides by the features of a layer, not by all."""
    W_RC, scale, *rest, _ = case(grid, torch.float64, 0.6)
    x, value = W_RC.view(2, 3, 24).requires_grad_(), learned_step(W_RC.detach(), scale, *rest).view(2, 3, 24)
    W, s, t = W_RC.detach().clone().requires_grad_(), *(scale.clone().requires_grad_() for _ in range(2))
    gradient = torch.randn_like(value)
    y = learned_value(x, value, s, *rest, 24)
    assert torch.equal(y, value)
    of_x, of_s = torch.autograd.grad(y, (x, s), gradient)
    of_W, of_t = torch.autograd.grad(learned_step(W, t, *rest), (W, t), gradient.view(6, 24))
    assert torch.equal(of_x.view(6, 24), of_W)
    assert_close(of_s, of_t * 6**0.5)


def test_straight_through_is_1_inside_and_0_outside():
    W_RC = torch.tensor([[-9.0, -8.5, -8.0, 0.2, 7.0, 7.5, 7.6]], requires_grad=True)
    straight_through(W_RC, torch.ones(1, 1), None, Codes(-8, 7)).sum().backward()
    assert W_RC.grad.tolist() == [[0, 1, 1, 1, 1, 1, 0]]


def test_the_gradient_of_a_scale_is_the_formula_of_the_paper():
    """Esser et al., eq. 3 and section 2.2, for Q_n = 8, Q_p = 7."""
    v = torch.tensor([[-9.0, -1.7, 0.4, 2.2, 30.0]])
    s = torch.full((1, 1), 0.25, requires_grad=True)
    learned_step(v * 0.25, s, None, Codes(-8, 7)).sum().backward()
    expected = -8 + (1.7 - 2) + (0 - 0.4) + (2 - 2.2) + 7
    assert_close(s.grad.item(), expected / (5 * 7) ** 0.5)


def test_a_scale_of_several_rows_counts_all_its_weights():
    W, s = torch.randn(4, 6), torch.full((4, 2), 0.3, requires_grad=True)
    (alone,) = torch.autograd.grad(learned_step(W, s, None, Codes(-8, 7)).sum(), s)
    (blocks,) = torch.autograd.grad(learned_step(W, s, None, Codes(-8, 7), count=12).sum(), s)
    assert_close(blocks, alone / 2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_relative_step_under_sgd_is_the_absolute_one_and_under_adam_a_share(optimizer):
    start, slope = torch.tensor([[0.02], [0.5]]), torch.tensor([[0.3], [-0.7]])
    absolute, change = start.clone().requires_grad_(), torch.zeros(2, 1, requires_grad=True)
    for parameter, scale in ((absolute, absolute), (change, relative_step(start, change, torch.float32))):
        (scale * slope).sum().backward()
        optimizer([parameter], lr=1e-2).step()
    moved = relative_step(start, change, torch.float32).detach()
    if optimizer is torch.optim.SGD:
        assert_close(moved, absolute.detach())
    else:
        assert_close(moved / start, torch.tensor([[0.99], [1.01]]))


def test_a_scale_stays_positive():
    change = torch.tensor([[-1.0], [-3.0]], requires_grad=True)
    scale = relative_step(torch.ones(2, 1), change, torch.float32)
    assert (scale > 0).all()
    scale[1].sum().backward()
    assert change.grad[1] == -1  # |1 + change| falls when change grows
    value = learned_step(torch.randn(2, 4), scale.detach(), None, Codes(-8, 7))
    assert value.isfinite().all()


def test_a_value_is_replaced_and_the_gradient_goes_on():
    x = torch.randn(5, requires_grad=True)
    value, inside = torch.randn(5), torch.tensor([True, False, True, True, False])
    replaced = replace_value(x, value, inside)
    assert torch.equal(replaced, value)
    replaced.sum().backward()
    assert torch.equal(x.grad, inside.float())


@pytest.mark.parametrize(
    ("W", "scale", "zero"),
    [
        ((4, 6), (4, 4), None),
        ((4, 6), (2, 1), None),
        ((4, 6), (4,), None),
        ((24,), (1,), None),
        ((4, 6), (4, 2), (4, 1)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(W, scale, zero):
    with pytest.raises(ValueError, match=r"expected W \[R, C\] and a scale \[1\], \[R, 1\] or \[R, G\]"):
        straight_through(torch.ones(W), torch.ones(scale), None if zero is None else torch.zeros(zero), Codes(-8, 7))


@pytest.mark.parametrize(
    ("W", "scale", "message"),
    [
        (torch.ones(2, 4).int(), torch.ones(1), "expected a floating W and scale, got torch.int32 and torch.float32"),
        (torch.ones(2, 4), torch.ones(1).int(), "got torch.float32 and torch.int32"),
        (torch.ones(2, 4), torch.ones(1, device="meta"), "W, scale and zero point are on cpu, meta; put them on one"),
    ],
)
def test_dtypes_and_devices_that_do_not_fit(W, scale, message):
    for function in (straight_through, learned_step):
        with pytest.raises(ValueError, match=message):
            function(W, scale, None, Codes(-8, 7))
