"""Cross moments against float64, and inputs of the dense model that are kept until a layer is finished."""

import torch
from torch.testing import assert_close

from lightning_compress.layerwise.dense_inputs import CrossMoment, DenseInputs
from lightning_compress.layerwise.input_hessian import InputHessian


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_moment_is_the_mean_over_tokens_however_they_are_split():
    X, dense = random(2, 60, 8), random(2, 60, 8, seed=1)
    expected = ((dense - X).double().mT @ X.double()) / 60
    for sizes in ([60], [7, 23, 30]):
        moment = CrossMoment(2, 8)
        for part in zip(X.split(sizes, 1), dense.split(sizes, 1), strict=True):
            moment.update(*part)
        assert_close(moment.value(60).double(), expected, rtol=1e-5, atol=1e-6)


def test_many_columns_are_added_in_strips(monkeypatch):
    monkeypatch.setattr("lightning_compress.layerwise.dense_inputs.ROWS", 3)
    X, dense = random(1, 20, 8), random(1, 20, 8, seed=1)
    moment = CrossMoment(1, 8)
    moment.update(X, dense)
    assert_close(moment.value(20), (dense - X).mT @ X / 20)


def test_one_input_without_its_dense_one_ends_the_moment():
    statistic = InputHessian(1, 8, cross=True)
    X = random(1, 20, 8)
    statistic.update(X, 2 * X)
    assert_close(statistic.cross_value(), statistic.value())
    statistic.update(X)
    assert statistic.cross_value() is None
    statistic.update(X, 2 * X)
    assert statistic.cross_value() is None
    assert_close(statistic.value(), X.mT @ X / 20)


def test_statistics_add_up_and_with_one_that_has_no_moment_there_is_none():
    X, Y = random(1, 20, 8), random(1, 30, 8, seed=1)
    first, second, third = (InputHessian(1, 8, cross=True) for _ in range(3))
    first.update(X, 3 * X)
    second.update(Y, Y + 1)
    third.update(Y)
    first.add_(second)
    expected = (2 * X.mT @ X + torch.ones(1, 8, 30) @ Y) / 50
    assert_close(first.cross_value(), expected, rtol=1e-5, atol=1e-5)
    assert first.tokens == 50
    first.add_(third)
    assert first.cross_value() is None


def test_an_input_is_a_copy_that_siblings_share_and_that_goes_with_the_last_of_them():
    inputs, x = DenseInputs(), random(2, 3)
    inputs.keep("q", x, 0)
    inputs.keep("k", x, 0)
    before = x.clone()
    x += 1
    q, k = inputs.get("q", x, 0), inputs.get("k", x, 0)
    assert q is k
    assert torch.equal(q, before)
    inputs.drop("q")
    assert inputs.get("q", x, 0) is None
    assert inputs.get("k", x, 0) is k


def test_an_input_that_cannot_be_told_from_others_is_not_known():
    inputs, x = DenseInputs(), random(2, 3)
    inputs.keep("twice", x, 0)
    inputs.keep("twice", x.clone(), 0)
    assert inputs.get("twice", x, 0) is None
    inputs.keep("other shape", x, 1)
    assert inputs.get("other shape", random(3, 3), 1) is None
    assert inputs.get("other shape", x, 0) is None
