"""The kernels against torch's arithmetic and the reference, in Triton's interpreter, on the CPU. Needs the extra
``kernels`` and TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both).

bf16 is left out: the interpreter truncates where a GPU rounds.
"""

import os

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.fake_quant import HALF_STEP, kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")

GRAINS = ["tensor", 24, 8, 3]  # columns of a group, of 24
DTYPES = [torch.float32, torch.float16]


LARGEST = {4: 6.0, 6: 7.5, 8: 448.0}
FORMS = [(0, False), (0, True), (8, False), (4, False), (6, False)]


def case(grain, float_bits, asymmetric, dtype, R=7, C=24):
    """Weights of which a tenth is outside of the grid, and some in the middle between two codes."""
    random = torch.Generator().manual_seed(3)
    size = (1,) if grain == "tensor" else (R, C // grain)
    scale = (torch.rand(size, generator=random) * 0.1 + 0.2).to(dtype)
    low, high = (-LARGEST[float_bits], LARGEST[float_bits]) if float_bits else (-8, 7)
    W_RC = torch.randn(R, C, generator=random) * (60 if float_bits == 8 else 1.2)
    W_RC[2] = (torch.arange(C) - C // 2 + 0.5) * scale.view(-1)[0].float()
    if float_bits in (4, 6):  # numbers in the middle between two of E2M1 or E2M3, and numbers themselves
        W_RC[3] = (torch.arange(C) - C // 2) * 2.0 ** (1 - float_bits // 2) * scale.view(-1)[0].float()
    W_RC[4, :3] = torch.tensor([0.0, 1e-3, -2e-3])
    zero = torch.randint(-4, 4, size, generator=random).char() if asymmetric and not float_bits else None
    return W_RC.to(dtype), scale, zero, low, high, float_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("float_bits", "asymmetric"), FORMS)
@pytest.mark.parametrize("grain", GRAINS)
def test_values_are_the_references_bit_for_bit(grain, float_bits, asymmetric, dtype):
    arguments = case(grain, float_bits, asymmetric, dtype)
    result = kernel.value(*arguments)
    assert result.dtype == dtype
    assert torch.equal(result, reference.fake_quantize(*arguments))


def test_float8_rounds_as_torch_does():
    halves = torch.arange(-1000, 1000) * 2.0**-11  # ties of the smallest numbers
    v = torch.cat([torch.linspace(-500, 500, 3000), torch.linspace(-0.05, 0.05, 3000), halves]).view(8, -1)
    result = kernel.value(v, torch.ones(1), None, -448.0, 448.0, 8)
    assert torch.equal(result, v.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("float_bits", "asymmetric"), FORMS)
@pytest.mark.parametrize("grain", GRAINS)
def test_gradients_are_those_of_the_reference(grain, float_bits, asymmetric, dtype):
    arguments = case(grain, float_bits, asymmetric, dtype)
    gradient = torch.randn(arguments[0].shape).to(dtype)
    expected = reference.straight_through_gradient(gradient, *arguments)
    of_W, nothing = kernel.gradients(gradient, *arguments, HALF_STEP[float_bits], (True, False))
    assert nothing is None
    assert torch.equal(of_W, expected)
    of_W, of_scale = kernel.gradients(gradient, *arguments, None, (True, True))
    expected_W, expected_scale = reference.learned_step_gradients(
        gradient.float(), *(t.float() if isinstance(t, torch.Tensor) else t for t in arguments)
    )
    assert torch.equal(of_W.float(), expected_W)
    count = arguments[0].numel() // arguments[1].numel()
    assert of_scale.shape == arguments[1].shape
    assert_close(of_scale / (count * arguments[4]) ** 0.5, expected_scale, rtol=1e-5, atol=1e-5)
    assert kernel.gradients(gradient, *arguments, None, (False, True))[0] is None


def test_long_lines_and_many_of_them():
    W_RC, gradient = torch.randn(3, 2500), torch.randn(3, 2500)
    for scale in (torch.full((3, 1), 0.3), torch.full((1,), 0.3), torch.full((3, 500), 0.3)):
        arguments = (W_RC, scale, None, -8, 7, 0)
        assert torch.equal(kernel.value(*arguments), reference.fake_quantize(*arguments))
        _, result = kernel.gradients(gradient, *arguments, None, (False, True))
        v = W_RC.double() / scale.double().repeat_interleave(2500 // scale.shape[-1], -1)
        slope = torch.where((v > -8) & (v < 7), v.round() - v, v.clamp(-8, 7)) * gradient
        expected = slope.sum().view(1) if scale.ndim == 1 else slope.view(3, scale.shape[1], -1).sum(-1)
        assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)


def test_nan_stays_and_strides_do_not_matter():
    W_RC = torch.randn(24, 7)
    W_RC[5, 2] = torch.nan
    result = kernel.value(W_RC.t(), torch.full((7, 3), 0.3), None, -8, 7, 0)
    assert result[2, 5].isnan()
    assert result.isnan().sum() == 1
    assert kernel.value(W_RC, torch.ones(1), None, -448.0, 448.0, 8).isnan().sum() == 1
