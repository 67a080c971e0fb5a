"""Static scales of inputs in training follow the averaged extremes of batches, then stand or are learned."""

import torch
from compressed_tensors.quantization import QuantizationArgs
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
