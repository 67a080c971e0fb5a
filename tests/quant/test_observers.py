import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from torch.testing import assert_close

from lightning_compress.layers.matrix import inputs_as_rows
from lightning_compress.layerwise import input_hessian as hessian
from lightning_compress.quant.observers import MSE, MeanSquare, MinMax, MovingAverage, Percentile, make_observer

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


def test_a_moving_average_goes_through_the_batches_of_all_ranks_in_their_order():
    whole, even, odd, idle = (MovingAverage(INT8, 0.3) for _ in range(4))
    for batch, x in enumerate(data().split(12)):
        whole.update(x, batch)
        (odd if batch % 2 else even).update(x, batch)
    assert merged(merged(idle, odd), even).bounds() == whole.bounds()


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


@pytest.mark.parametrize("args", [INT8, QuantizationArgs(num_bits=4), QuantizationArgs(num_bits=4, symmetric=False)])
def test_mse_is_as_good_as_a_search_over_all_that_was_seen(args):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    observer = MSE(args)
    observer.update(x)

    def error(factor):
        scale, zero = calculate_qparams(*(factor * end.reshape(1) for end in x.aminmax()), args)
        return float((fake_quantize(x, scale, zero, args) - x).abs().pow(2.4).sum())

    best = min(error(f) for f in MSE.FACTORS)
    found = observer.bounds()[1] / float(x.max())
    assert error(found) < 1.1 * best


def test_percentile_leaves_out_a_ten_thousandth():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 1000.0, -500.0
    observer = Percentile(INT8)
    observer.update(x)
    low, high = observer.bounds()
    assert high == pytest.approx(float(x.double().quantile(1 - 1e-4)), rel=0.05)
    assert low == pytest.approx(float(x.double().quantile(1e-4)), rel=0.05)


def test_entropy_clips_outliers_and_keeps_even_data():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    x[0] = 60.0
    observer = make_observer("histogram", QuantizationArgs(num_bits=4), 0.01)
    observer.update(x)
    assert observer.bounds()[1] <= 6
    even = make_observer("histogram", INT8, 0.01)
    even.update(torch.linspace(-1, 1, 50_001))
    assert even.bounds()[1] > 0.85


# -- all of them ------------------------------------------------------------------------------------------------------

OBSERVERS = ["minmax", "moving_average", "mse", "percentile", "histogram"]
STATISTICS = [*OBSERVERS, "imatrix", "hessian", "hessian of groups"]


class OfGroups(hessian.InputHessian):
    """The blocks on the diagonal of H, for groups of 4 columns."""

    def __init__(self):
        super().__init__(2, 4)

    def update(self, X_PNC):
        super().update(hessian.groups_as_partitions(X_PNC, 4))


def made(name):
    moments = {
        "imatrix": lambda: MeanSquare(1, 8),
        "hessian": lambda: hessian.InputHessian(1, 8),
        "hessian of groups": OfGroups,
    }
    return moments[name]() if name in moments else make_observer(name, ASYM, 0.1)


def merged(one, two):
    """What ``Team.reduce_`` leaves on every rank."""
    operations = {"sum": lambda a, b: a + b, "min": min, "max": max, "union": lambda a, b: a | b}
    for attribute, operation in one.reduce.items():
        setattr(one, attribute, operations[operation](getattr(one, attribute), getattr(two, attribute)))
    return one


def values(statistic):
    value = statistic.value()
    return value if isinstance(value, torch.Tensor) else torch.cat([part.float() for part in value])


@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "moving_average"])  # it weighs batches
def test_a_batch_that_is_split_is_the_whole(name):
    x, whole, parts = data()[None], made(name), made(name)
    whole.update(x)
    for piece in x.split([7, 23, 30], 1):
        parts.update(piece)
    assert_close(values(parts), values(whole), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", STATISTICS)
def test_two_ranks_merged_are_the_whole(name):
    x, whole, ranks, idle = data()[None], made(name), [made(name), made(name)], made(name)
    for batch, (half, one) in enumerate(zip(x.split(30, 1), ranks, strict=True)):
        number = (batch,) if name in OBSERVERS else ()
        one.update(half, *number)
        if name == "moving_average":  # it weighs batches
            whole.update(half, batch)
    if name != "moving_average":
        whole.update(x)
    assert_close(values(merged(merged(idle, ranks[0]), ranks[1])), values(whole), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", STATISTICS)
def test_masked_tokens_are_left_out(name):
    x = data().view(4, 15, 8).clone()
    mask = torch.rand(4, 15, generator=torch.Generator().manual_seed(1)) > 0.3
    plain, masked = made(name), made(name)
    plain.update(x[mask][None])
    x[~mask] = 1e6
    masked.update(inputs_as_rows(nn.Linear(8, 2), x, mask))
    assert_close(values(masked), values(plain), rtol=0, atol=0)


def test_moments_by_hand():
    moment, x = MeanSquare(2, 4), torch.randn(2, 9, 4)
    moment.update(x)
    assert_close(moment.value(), x.square().mean(1))
    with pytest.raises(ValueError, match="never saw data"):
        MeanSquare(1, 4).value()


def test_the_scale_is_in_the_dtype_asked_for():
    observer = MinMax(INT8)
    observer.update(data())
    assert observer.value(torch.bfloat16)[0].dtype == torch.bfloat16
    assert observer.value()[0].shape == (1,)


@pytest.mark.parametrize("name", OBSERVERS)
def test_faults(name):
    observer = make_observer(name, INT8, 0.01)
    with pytest.raises(ValueError, match="never saw data"):
        observer.value()
    observer.update(data())
    with pytest.raises(ValueError, match=r"its input 1 \(counted from 0\) holds NaN or Inf"):
        observer.update(torch.tensor([1.0, torch.nan]))
