"""Divergences are zero where student and teacher agree, and equal slow sums elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightning_compress.maths.divergence import (
    attention_distance,
    hidden_distance,
    logit_divergence,
    masked_mean,
    top_k_divergence,
)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 50, generator=generator), torch.randn(7, 50, generator=generator)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_zero_for_equal_logits_and_positive_for_others(logits, kind):
    student, teacher = logits
    assert logit_divergence(teacher, teacher, 2.0, kind).abs().max() < 1e-5
    assert (logit_divergence(student, teacher, 2.0, kind) > 0.01).all()


def test_forward_and_reverse_equal_the_sums_of_their_definition(logits):
    student, teacher = logits
    T = 2.5
    p, q = (teacher.double() / T).softmax(-1), (student.double() / T).softmax(-1)
    rows = list(zip(p.tolist(), q.tolist(), strict=True))
    forward = torch.tensor([sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in rows])
    reverse = torch.tensor([sum(b * math.log(b / a) for a, b in zip(*row, strict=True)) for row in rows])
    assert_close(logit_divergence(student, teacher, T, "forward"), T * T * forward, rtol=1e-4, atol=1e-6)
    assert_close(logit_divergence(student, teacher, T, "reverse"), T * T * reverse, rtol=1e-4, atol=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded_by_log_2(logits):
    student, teacher = logits
    one, other = logit_divergence(student, teacher, 1.0, "jsd"), logit_divergence(teacher, student, 1.0, "jsd")
    assert_close(one, other)
    assert (one <= math.log(2)).all()


def test_the_temperature_factor_keeps_the_gradient_of_small_differences(logits):
    """For T -> large and zero-mean logits the gradient tends to (s - t) / V whatever T is (Hinton et al., eq. 4)."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in logits)
    student.requires_grad_()
    gradient, = torch.autograd.grad(logit_divergence(student, teacher, 200.0).sum(), student)
    assert_close(gradient, (student - teacher).detach() / 50, rtol=0.05, atol=5e-4)


def test_top_k_with_the_rest_is_at_most_the_full_divergence_and_reaches_it(logits):
    student, teacher = logits
    full = logit_divergence(student, teacher)
    last = torch.zeros(7)
    for k in (1, 5, 20, 49):
        log_p, index = F.log_softmax(teacher, -1).topk(k)
        part = top_k_divergence(student, log_p, index)
        assert (part <= full + 1e-5).all()
        assert part.mean() >= last.mean() - 1e-6
        last = part
    assert_close(last, full, rtol=1e-4, atol=1e-4)


def test_hidden_distances():
    teacher = torch.randn(5, 8)
    assert_close(hidden_distance(2 * teacher, teacher), torch.ones(5))
    assert_close(hidden_distance(-teacher, teacher, "cosine"), torch.full((5,), 2.0))
    assert_close(hidden_distance(3 * teacher, teacher, "cosine"), torch.zeros(5), atol=1e-6, rtol=0)


def test_attention_maps_of_other_head_counts_compare_by_their_mean():
    teacher = torch.randn(2, 4, 6, 6).softmax(-1)
    student = teacher.mean(1, keepdim=True).expand(2, 2, 6, 6)
    assert attention_distance(student, teacher).abs().max() < 1e-6


def test_masked_tokens_have_no_gradient(logits):
    student, teacher = logits
    student.requires_grad_()
    mask = torch.tensor([True, False, True, False, False, True, True])
    masked_mean(logit_divergence(student, teacher), mask).backward()
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask].abs().sum(1) > 0).all()
