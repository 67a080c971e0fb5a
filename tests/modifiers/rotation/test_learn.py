"""Learned rotations stay orthogonal, never get worse, and find a planted solution."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.modifiers.rotation.hadamard import random_hadamard, random_orthogonal
from lightning_compress.modifiers.rotation.learn import Reader, TokenSample, cayley_step, learn_rotation, rounding_loss

n = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def readers(count=3):
    """Low-rank inputs with large channels, so that some rotations do better than others."""
    data = []
    for seed in range(count):
        g = generator(seed)
        Z = torch.randn(96, 6, generator=g) @ torch.randn(6, n, generator=generator(99))
        Z += 0.2 * torch.randn(96, n, generator=g)
        Z[:, 5] *= 20
        data.append(Reader(Z / Z.norm(dim=1, keepdim=True), torch.randn(40, n, generator=g)))
    return data


@pytest.mark.parametrize("keep_mean", [False, True])
def test_a_step_stays_on_the_orthogonal_matrices_and_goes_downhill(keep_mean):
    R = random_orthogonal(n, generator(1), keep_mean=keep_mean)
    target = random_orthogonal(n, generator(2), keep_mean=keep_mean)

    def distance(R):
        return (R - target).square().sum()

    first = distance(R)
    for _ in range(50):
        R = cayley_step(R, 2 * (R - target), 0.02, keep_mean)
    assert_close(R @ R.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert distance(R) < 0.9 * first
    if keep_mean:
        ones = torch.ones(n, dtype=torch.float64)
        assert_close(R @ ones, ones, rtol=0, atol=1e-12)


def test_a_step_turns_by_its_angle():
    R = random_orthogonal(n, generator(1))
    turned = cayley_step(R, torch.randn(n, n, generator=generator(3), dtype=torch.float64), 1e-3) @ R.t()
    angle = (turned - torch.eye(n, dtype=torch.float64)).norm().item() / n**0.5
    assert angle == pytest.approx(1e-3, rel=1e-3)


def test_the_step_follows_the_negative_gradient_to_first_order():
    """Against a finite difference of a smooth function along the step."""
    R, C = random_orthogonal(n, generator(1)), torch.randn(n, n, generator=generator(4), dtype=torch.float64)

    def f(R):
        return (C * R).sum() + (R**3).sum()

    variable = R.clone().requires_grad_()
    (G,) = torch.autograd.grad(f(variable), variable)
    A = G @ R.t() - R @ G.t()
    direction = -A @ R / (A.norm() / n**0.5)
    angle = 1e-5
    slope = (f(cayley_step(R, G, angle)) - f(R)) / angle
    assert_close(slope, (G * direction).sum(), rtol=1e-3, atol=0)
    assert slope < 0


@pytest.mark.parametrize("keep_mean", [False, True])
def test_learning_is_seeded_never_worse_and_orthogonal(keep_mean):
    start = random_hadamard(n, generator(), keep_mean=keep_mean)
    one, two = (learn_rotation(start, readers(), 60, 0.1, 4, generator(5), keep_mean) for _ in range(2))
    assert_close(one.R, two.R, rtol=0, atol=0)
    assert one.after < 0.9 * one.before
    assert_close(float(rounding_loss(start.float(), readers(), 4)), one.before, rtol=1e-5, atol=0)
    assert_close(float(rounding_loss(one.R.float(), readers(), 4)), one.after, rtol=1e-5, atol=0)
    assert_close(one.R @ one.R.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
    assert learn_rotation(start, readers(), 0, 0.1, 4, generator(), keep_mean).after == one.before
    wild = learn_rotation(start, readers(), 10, 3.0, 4, generator(), keep_mean)
    assert wild.after <= wild.before


def test_the_loss_against_a_slow_computation():
    R, (reader, *_) = random_orthogonal(n, generator()).float(), readers()

    def rounded(x):
        rows = []
        for row in x:
            scale = row.abs().max() / 7.5
            rows.append(torch.stack([(v / scale).round().clamp(-8, 7) * scale for v in row]))
        return torch.stack(rows)

    exact = reader.Z_TC @ reader.V_OC.t()
    error = rounded(reader.Z_TC @ R) @ rounded(reader.V_OC @ R).t() - exact
    assert_close(rounding_loss(R, [reader], 4), error.square().sum() / exact.square().sum())


def test_a_sample_is_fair_and_bounded():
    counts = torch.zeros(40)
    for seed in range(400):
        sample = TokenSample(10, generator(seed))
        for piece in torch.arange(40.0)[:, None].split([3, 30, 7]):
            sample.update(piece)
        value = sample.value()
        assert value.shape == (10, 1)
        assert len(value.unique()) == 10
        counts[value.long().flatten()] += 1
    assert counts.min() > 60
    assert counts.max() < 140
    assert TokenSample(10, generator()).value() is None
