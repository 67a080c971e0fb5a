import pytest
import torch

from lightning_compress.layerwise.short_descent import set_rate, short_adam


def test_the_rate_falls_from_the_first_to_zero_along_a_cosine():
    optimizer = short_adam([torch.zeros(2)], 0.5)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(5):
        set_rate(optimizer, 0.5, step, 4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.4267767, 0.25, 0.0732233, 0.0], abs=1e-7)


def test_moments_forget_within_few_steps():
    """After a gradient of 1 and nine of 0 the second moment is 0.05 times 0.95^9."""
    tensor = torch.zeros(1, requires_grad=True)
    optimizer = short_adam([tensor], 1e-3)
    for gradient in [1.0] + [0.0] * 9:
        tensor.grad = torch.tensor([gradient])
        optimizer.step()
    assert float(optimizer.state[tensor]["exp_avg_sq"]) == pytest.approx(0.05 * 0.95**9, rel=1e-5)
