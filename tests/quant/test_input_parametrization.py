"""Static scales of inputs in training follow the averaged extremes of batches, then stand or are learned."""

import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from torch import nn
from torch.testing import assert_close

from lightning_compress.quant.fake_quant import fake_quantize_input
from lightning_compress.quant.input_parametrization import FakeQuantizeInput

INT8 = QuantizationArgs(num_bits=8, strategy="tensor")
LIKE = torch.zeros(1)


def batch(fake, module, x):
    y = fake(module, x)
    fake.take_batch(fake.batch_low.clone(), fake.batch_high.clone())
    return y


def test_the_scale_is_the_average_of_the_extremes_until_it_is_frozen():
    fake, module, x = FakeQuantizeInput(INT8, 0.25, LIKE), nn.Linear(4, 1), torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    assert batch(fake, module, x) is x  # before the first batch is over inputs pass
    assert_close(fake.scale, torch.tensor([2 / 127.5]))
    batch(fake, module, 3 * x)
    assert_close(fake.scale, torch.tensor([(0.75 * 2 + 0.25 * 6) / 127.5]))
    fake.freeze()
    assert_close(batch(fake, module, 9 * x), fake_quantize_input(module, 9 * x, INT8, fake.scale, None))
    assert fake.batches == 2


def test_without_gradients_nothing_is_observed_and_a_batch_without_data_counts_for_nothing():
    fake, module = FakeQuantizeInput(INT8, 0.25, LIKE), nn.Linear(4, 1)
    with torch.no_grad():
        batch(fake, module, torch.ones(1, 4))
    assert fake.batches == 0


def test_gradients_pass_inside_the_range_and_stop_outside():
    fake, module = FakeQuantizeInput(INT8, 1.0, LIKE), nn.Linear(4, 1)
    batch(fake, module, torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    fake.freeze()
    x = torch.tensor([[0.3, -0.9, 2.0, -5.0]], requires_grad=True)
    fake(module, x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_nvfp4_averages_its_global_scale_and_clamps_beyond_the_largest_one():
    args = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    inputs, layer = FakeQuantizeInput(args, 0.5, torch.zeros(1)), nn.Linear(16, 2)
    x = torch.linspace(-3, 3, 32).view(2, 16)
    assert torch.equal(inputs(layer, x.requires_grad_()), x)  # no batch yet
    inputs.take_batch(inputs.batch_low.clone(), inputs.batch_high.clone())
    inputs.take_batch(torch.tensor([-1.0]), torch.tensor([1.0]))
    assert torch.equal(inputs.record()["input_global_scale"], torch.tensor([448 * 6 / 2.0]))
    y = inputs(layer, x)
    y.sum().backward()
    assert torch.equal(x.grad, (x.abs() <= 2 * 7 / 6).float())
    assert y.abs().amax() == 2
    inputs.to(torch.bfloat16)
    assert inputs.global_scale.dtype == torch.float32
