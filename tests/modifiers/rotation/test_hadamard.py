"""H H^T = n I for every order that is claimed; the fast transform is the matrix; random ones are orthogonal."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.modifiers.rotation.hadamard import (
    fast_hadamard_transform,
    hadamard,
    is_order,
    random_hadamard,
    random_orthogonal,
)

ORDERS = [n for n in range(1, 401) if is_order(n)]
WIDTHS = [576, 896, 960, 1536, 2048, 3584, 4864, 5120, 5632, 8960, 9728, 11008, 13824, 14336, 18944, 27648, 29568]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_matrices_of_all_claimed_orders():
    for n in ORDERS:
        H = hadamard(n)
        assert_close(H @ H.t(), n * torch.eye(n, dtype=torch.float64), rtol=0, atol=0)
        assert bool((H.abs() == 1).all())
        assert bool((H[0] == 1).all())
        assert bool((H[:, 0] == 1).all())


def test_which_orders_there_are():
    """All multiples of four below 400 but those that Paley, Sylvester and products of theirs do not give."""
    missing = [n for n in range(4, 401, 4) if n not in ORDERS]
    known = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376]
    assert missing == known
    assert [n for n in ORDERS if n % 4] == [1, 2]
    assert all(is_order(n) for n in WIDTHS)


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 28, 36, 52, 100, 144, 344, 576, 1024])
def test_the_fast_transform_is_the_matrix(n):
    x = torch.randn(3, 5, n, generator=generator(), dtype=torch.float64)
    assert_close(fast_hadamard_transform(x), x @ hadamard(n), rtol=0, atol=1e-10)
    assert_close(fast_hadamard_transform(x, transpose=True), x @ hadamard(n).t(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize(("make", "n"), [
    (random_hadamard, 1), (random_hadamard, 36), (random_hadamard, 64),
    (random_orthogonal, 1), (random_orthogonal, 7), (random_orthogonal, 64),
])  # fmt: skip
def test_random_rotations_are_orthogonal_and_seeded(make, n, keep_mean):
    R = make(n, generator(), keep_mean=keep_mean)
    assert_close(R @ R.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(R, make(n, generator(), keep_mean=keep_mean), rtol=0, atol=0)
    if n > 1:
        assert not torch.equal(R, make(n, generator(1), keep_mean=keep_mean))
    if keep_mean:
        ones = torch.ones(n, dtype=torch.float64)
        assert_close(R @ ones, ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_one_large_coordinate_is_spread(make, keep_mean):
    n = 256
    x = torch.zeros(n, dtype=torch.float64)
    x[3] = 1
    assert (x @ make(n, generator(), keep_mean=keep_mean)).abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("n", "near"), [(0, "1"), (3, "2 and 4"), (92, "88 and 96"), (577, "576 and 580"), (30, "28 and 32")]
)
def test_an_order_without_a_matrix_lists_the_nearest_ones(n, near):
    with pytest.raises(ValueError, match=f"order {n} can be built; the nearest orders are {near}"):
        hadamard(n)
    with pytest.raises(ValueError, match="nearest orders"):
        fast_hadamard_transform(torch.zeros(2, n))


def test_the_message_names_the_largest_block_that_divides():
    with pytest.raises(ValueError, match="blocks of 52 divide it"):
        hadamard(260)
