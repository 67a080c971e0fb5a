"""Knobs: gradients against autograd through s (c - z) written out, codes that stay, zeros that stay."""

import pytest
import torch
from torch import nn

from lightning_compress import GPTQModifier, QuantizationModifier, compress
from lightning_compress.layers.forward import gradients_for
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.tune.knobs import (
    GlobalScaleKnob,
    InputScaleKnob,
    ScaleKnob,
    TensorKnob,
    gradients_to,
    has_fine_scales,
    scale_knobs,
)
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized

INT = {"type": "int", "symmetric": True}
FORMS = {
    "group": {"num_bits": 4, **INT, "strategy": "group", "group_size": 8},
    "asymmetric group": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8},
    "channel": {"num_bits": 8, **INT, "strategy": "channel"},
    "asymmetric channel": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"},
    "tensor": {"num_bits": 8, **INT, "strategy": "tensor"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8 blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
}
SCHEMES = {**FORMS, "NVFP4": "NVFP4", "MXFP4": "MXFP4"}
LAYERS = {"linear": lambda: nn.Linear(32, 24), "convolution": lambda: nn.Conv2d(8, 24, 2)}


def quantized(form, layer="linear", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]()).to(dtype)
    scheme, target = SCHEMES[form], [type(model[0]).__name__]
    if isinstance(scheme, str):
        modifier = QuantizationModifier(scheme=scheme, targets=target)
    else:
        modifier = QuantizationModifier(config_groups={"g": {"weights": scheme, "targets": target}})
    compress(model, modifier, [torch.randn(4, 32, dtype=dtype)] if isinstance(scheme, str) else None)
    return model[0], Quantized.of(model[0])


def written_out(units_RC, scale, args, R):
    """s (c - z) by loops over the scales."""
    C = units_RC.shape[1]
    b, g = args.block_structure or (1, args.group_size or C)
    rows = []
    for r in range(R):
        pieces = [
            (scale.reshape(-1)[0] if scale.ndim == 1 else scale[r // b, i]) * units_RC[r, i * g : (i + 1) * g]
            for i in range(-(-C // g))
        ]
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_scales_written_out(form, layer):
    module, record = quantized(form, layer)
    knob, R = ScaleKnob(module, record), module.weight.shape[0]
    W_RC = as_matrix(module).clone()
    ones = torch.ones_like(record.scale)
    units_RC = W_RC / written_out(torch.ones_like(W_RC), record.scale, knob.args, R)
    G_RC = torch.randn(W_RC.shape, generator=torch.Generator().manual_seed(1))
    change = torch.zeros_like(record.scale, requires_grad=True)
    (written_out(units_RC, record.scale * (ones + change), knob.args, R) * G_RC).sum().backward()
    with gradients_to([knob]):
        for _ in range(2):
            (module.weight.flatten(1) * G_RC).sum().backward()
    assert module.weight.grad is None
    torch.testing.assert_close(knob.sum.float(), 2 * change.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [form for form in SCHEMES if form != "MXFP4"])
def test_codes_stay_whatever_the_scales_do(form, dtype):
    """Rounded to the new grid the weight is itself, its codes are those before, and d = 0 gives back all bits."""
    module, record = quantized(form, dtype=dtype)
    before, scale = module.weight.detach().clone(), record.scale.clone()
    knob = ScaleKnob(module, record)
    units = knob._units().clone()
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        knob.change.copy_(torch.randn(knob.change.shape, generator=generator) * 0.1)
        knob.write()
        new = Quantized.of(module)
        args = record.scheme.weights
        coarse = dtype == torch.bfloat16 or form == "NVFP4"  # which passes through bfloat16
        assert not torch.equal(new.scale, scale)
        assert new.scale.dtype == scale.dtype
        weight = as_matrix(module)
        assert torch.equal(round_weight(weight, new.scale, new.zero_point, args), weight)
        torch.testing.assert_close(knob._units(), units, rtol=2**-7 if coarse else 1e-5, atol=0)
        if args.type == "int":
            assert torch.equal(knob._units(), units)
    knob.change.zero_()
    knob.write()
    assert torch.equal(module.weight, before)
    assert torch.equal(Quantized.of(module).scale, scale)


def test_scales_of_nvfp4_stay_numbers_of_e4m3():
    module, record = quantized("NVFP4")
    knob = ScaleKnob(module, record)
    knob.change.fill_(0.03)
    knob.write()
    stored = knob.record.scale * record.global_scale
    assert torch.equal(stored, stored.to(torch.float8_e4m3fn).float())


class Attention(nn.Module):
    """Three Linears that servers fuse, of one input, and one that stands alone."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o_proj = nn.Linear(16, 32)

    def forward(self, x):
        return self.o_proj(self.q_proj(x).tanh() + self.k_proj(x).tanh() + self.v_proj(x).tanh())


def attention(scheme):
    torch.manual_seed(0)
    model = Attention()
    compress(model, QuantizationModifier(scheme=scheme, targets=["Linear"]), [torch.randn(4, 32)])
    return model


def kinds(knobs, kind):
    return [knob for knob in knobs if isinstance(knob, kind)]


def test_the_global_scale_of_fused_weights_stays_one_and_its_gradient_is_that_of_all():
    """Codes of weights and of block scales stay; the weights grow by one factor, but for bfloat16."""
    model = attention("NVFP4")
    knobs = kinds(scale_knobs(model), GlobalScaleKnob)
    assert [len(knob.tensors) for knob in knobs] == [3, 1]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    fused = [model.q_proj, model.k_proj, model.v_proj]
    factor = torch.ones(1, requires_grad=True)
    outputs = [nn.functional.linear(x, module.weight.detach() * factor) for module in fused]
    sum(output.square().sum() for output in outputs).backward()
    with gradients_to(knobs):
        sum(nn.functional.linear(x, module.weight).square().sum() for module in fused).backward()
    torch.testing.assert_close(knobs[0].sum.float(), factor.grad)

    before = [(Quantized.of(module), module.weight.detach().clone()) for module in fused]
    knobs[0].change.fill_(0.02)
    with torch.no_grad():
        knobs[0].write()
    for module, (record, weight) in zip(fused, before, strict=True):
        new = Quantized.of(module)
        assert new.global_scale == Quantized.of(model.q_proj).global_scale
        torch.testing.assert_close(new.global_scale * 1.02, record.global_scale)
        stored = [(r.scale * r.global_scale).to(torch.float8_e4m3fn).float() for r in (record, new)]
        assert torch.equal(*stored)
        torch.testing.assert_close(module.weight.data, weight * 1.02, rtol=2**-7, atol=0)
        assert torch.equal(round_weight(module.weight, new.scale, None, record.scheme.weights), module.weight)
    knobs[0].change.zero_()
    with torch.no_grad():
        knobs[0].write()
    for module, (record, weight) in zip(fused, before, strict=True):
        assert torch.equal(module.weight, weight)
        assert torch.equal(Quantized.of(module).global_scale, record.global_scale)


STATIC = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "asymmetric int8": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
}


@pytest.mark.parametrize("form", STATIC)
def test_static_scales_of_inputs_follow_the_loss(form):
    """The gradient against a difference quotient where rounding does not matter: of inputs beyond the range."""
    weights = {"num_bits": 8, "type": STATIC[form]["type"], "symmetric": True, "strategy": "channel"}
    model = attention({"weights": weights, "input_activations": STATIC[form]})
    knobs = kinds(scale_knobs(model), InputScaleKnob)
    assert [len(knob.tensors) for knob in knobs] == [3, 1]
    x = 1e3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    fused = [model.q_proj, model.k_proj, model.v_proj]

    def loss():
        return sum(module(x).sum() for module in fused)

    before = [Quantized.of(module).input_scale.clone() for module in fused]
    with gradients_for(model, knobs[0].tensors), gradients_to(knobs[:1]):
        loss().backward()
        assert all(module.weight.grad is None for module in fused)
    with torch.no_grad():
        first = float(loss())
        knobs[0].change.fill_(0.5)
        knobs[0].write()
        high = {"int8": 127, "asymmetric int8": 127, "fp8": 448}[form]
        expected = (float(loss()) - first) / 0.5
    assert float(knobs[0].sum) * high**0.5 == pytest.approx(expected, rel=1e-3)  # LSQ divides by sqrt(N q_max), N = 1
    for module, scale in zip(fused, before, strict=True):
        new = Quantized.of(module).input_scale
        assert not new.requires_grad
        torch.testing.assert_close(new, 1.5 * scale)


def test_powers_of_two_are_no_knobs():
    assert not has_fine_scales(quantized("MXFP4")[1])
    assert has_fine_scales(quantized("NVFP4")[1])
    assert has_fine_scales(quantized("group")[1])


def test_a_latent_weight_is_dropped():
    """Training continues from it, and it belongs to the scales before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    compress(model, GPTQModifier(scheme="W4A16", group_size=8, keep_latents=True), [torch.randn(32, 16)])
    record = Quantized.of(model[0])
    assert record.latent is not None
    ScaleKnob(model[0], record).write()
    assert Quantized.of(model[0]).latent is None


def test_zeros_of_a_sparse_weight_stay():
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    knob = TensorKnob(weight, sparse=True)
    with gradients_to([knob]):
        weight.sum().backward()
    unit = (25 / 4) ** 0.5
    torch.testing.assert_close(knob.sum, torch.tensor([unit, unit], dtype=torch.float64))  # of the nonzeros alone
    assert knob.change.numel() == knob.start.numel() == 2
    knob.change.fill_(1.0)
    with torch.no_grad():
        knob.write()
    torch.testing.assert_close(weight.data, torch.tensor([[3.0 + unit, 0.0], [0.0, -4.0 + unit]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_batch_has_the_same_sum_in_half_the_memory(dtype):
    """float32 is exact for one gradient; several are added in float64, so that their order leaves no trace."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype) * (torch.arange(5) % 2))
    inputs, sums = torch.randn(3, 5, generator=generator).to(dtype), {}
    for several in (False, True):
        knob = TensorKnob(weight, sparse=True)
        with gradients_to([knob], several=several):
            (inputs @ weight.T).square().sum().backward()
        sums[several] = knob.sum
    assert (sums[False].dtype, sums[True].dtype) == (torch.float32, torch.float64)
    assert torch.equal(sums[False], sums[True].float())
    assert sums[True].abs().max() > 0


def test_experts_in_one_tensor_have_a_knob_each():
    whole = nn.Parameter(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))

    class Slice(TensorKnob):
        def __init__(self, i):
            super().__init__(whole)
            self.i = i

        def gradient(self, gradient, tensor):
            return gradient * (torch.arange(2) == self.i)[:, None, None]

    knobs = [Slice(0), Slice(1)]
    with gradients_to(knobs):
        (whole * torch.tensor([1.0, 2.0])[:, None, None]).sum().backward()
    assert [knob.sum.sum().item() for knob in knobs] == [12.0, 24.0]
    assert whole.grad is None
    assert not whole._post_accumulate_grad_hooks
