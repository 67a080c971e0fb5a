import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch.testing import assert_close

from lightning_compress.quant.observers import MSE, MinMax, MovingAverage, make_observer

INT8 = QuantizationArgs(num_bits=8)
ASYM = QuantizationArgs(num_bits=8, symmetric=False)


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_minmax_does_not_care_how_tokens_are_batched():
    x, whole, parts = data(), MinMax(INT8), MinMax(INT8)
    whole.update(x)
    for piece in x.split([7, 23, 30]):
        parts.update(piece)
    assert torch.equal(whole.value()[0], parts.value()[0])
    assert_close(whole.value()[0], x.abs().max()[None] / 127.5)


def test_asymmetric_covers_both_ends():
    x, observer = data(), MinMax(ASYM)
    observer.update(x)
    scale, zero = observer.value()
    assert_close(scale, (x.max() - x.min())[None] / 255)
    assert_close((-128 - zero.float()) * scale, x.min()[None], atol=scale.item(), rtol=0)


def test_moving_average_by_hand():
    observer = MovingAverage(INT8, averaging_constant=0.1)
    for high in (1.0, 2.0, 4.0):
        observer.update(torch.tensor([-0.5, high]))
    assert observer.bounds() == pytest.approx((-0.5, (1.0 * 0.9 + 2.0 * 0.1) * 0.9 + 4.0 * 0.1))


def test_ranks_of_a_moving_average_are_averaged():
    one, two, idle = MovingAverage(INT8), MovingAverage(INT8), MovingAverage(INT8)
    one.update(torch.tensor([-1.0, 2.0]))
    two.update(torch.tensor([-3.0, 4.0]))
    for name in MovingAverage.reduce:  # what all_reduce_ does
        setattr(one, name, getattr(one, name) + getattr(two, name) + getattr(idle, name))
    assert one.bounds() == (-2.0, 3.0)


def test_mse_clips_a_lonely_outlier_and_leaves_even_data_alone():
    args = QuantizationArgs(num_bits=4)
    x = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    clipped, kept = MSE(args), MinMax(args)
    clipped.update(x)
    kept.update(x)
    assert clipped.value()[0] < 0.7 * kept.value()[0]
    even = MSE(args)
    even.update(torch.linspace(-1, 1, 1001))
    assert even.bounds()[1] > 0.85


def test_mse_means_over_batches():
    observer, parts = MSE(INT8), [MSE(INT8), MSE(INT8)]
    for part, seed in zip(parts, (0, 1), strict=True):
        part.update(data(seed))
        observer.update(data(seed))
    assert observer.bounds()[1] == pytest.approx((parts[0].bounds()[1] + parts[1].bounds()[1]) / 2)


def test_the_scale_is_in_the_dtype_asked_for():
    observer = MinMax(INT8)
    observer.update(data())
    assert observer.value(torch.bfloat16)[0].dtype == torch.bfloat16
    assert observer.value()[0].shape == (1,)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "mse"])
def test_faults(name):
    observer = make_observer(name, INT8, 0.01)
    with pytest.raises(ValueError, match="never saw data"):
        observer.value()
    observer.update(data())
    with pytest.raises(ValueError, match="NaN or Inf in calibration batch 2"):
        observer.update(torch.tensor([1.0, torch.nan]))
