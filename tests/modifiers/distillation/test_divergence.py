"""Divergences are zero where student and teacher agree, and equal slow sums elsewhere."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.modifiers.distillation.divergence import (
    attention_distance,
    hidden_distance,
    logit_divergence,
    masked_mean,
    top_k_divergence,
    top_logits,
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
    (gradient,) = torch.autograd.grad(logit_divergence(student, teacher, 200.0).sum(), student)
    assert_close(gradient, (student - teacher).detach() / 50, rtol=0.05, atol=5e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_top_k_with_the_rest_is_at_most_the_full_divergence_and_reaches_it(logits, kind, T):
    student, teacher = logits
    full = logit_divergence(student, teacher, T, kind)
    last = torch.zeros(7)
    for k in (1, 5, 20, 49, 50):
        part = top_k_divergence(student, top_logits(teacher, k), T, kind)
        assert (part <= full + 2e-3).all()  # float16 keeps 3 digits
        assert part.mean() >= last.mean() - 2e-3
        last = part
    assert_close(last, full, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("T", [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0])
def test_top_k_is_the_divergence_of_the_distributions_with_one_bucket(T):
    """Against buckets made by hand from all logits, in float64."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(5, 4, 1000, generator=generator)
    student = teacher + torch.randn(5, 4, 1000, generator=generator)
    index = teacher.topk(8, -1).indices

    def buckets(logits):
        p = (logits.double() / T).softmax(-1)
        kept = p.gather(-1, index)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    p, q = buckets(teacher), buckets(student)
    expected = (T * T * (p * (p / q).log()).sum(-1)).float()
    exact = T in (0.5, 1.0, 2.0, 4.0)  # elsewhere the mass of the others is interpolated
    assert_close(top_k_divergence(student, top_logits(teacher, 8), T), expected, rtol=0.01 if exact else 0.1, atol=2e-3)


def test_top_k_of_masked_classes_is_finite():
    """Classes that both models rule out, with logits of -inf: kept ones, all others, and none."""
    teacher = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf, 0.5]])
    student = torch.tensor([[0.5, 1.0, -torch.inf, -torch.inf, 1.5]], requires_grad=True)
    finite = [0, 1, 4]
    for T in (1.0, 3.0):
        expected = logit_divergence(student[:, finite], teacher[:, finite], T)
        for k in (3, 4, 5):
            part = top_k_divergence(student, top_logits(teacher, k), T)
            assert_close(part, expected, rtol=5e-3, atol=1e-3)
            (gradient,) = torch.autograd.grad(part.sum(), student, retain_graph=True)
            assert gradient.isfinite().all()
        assert_close(logit_divergence(student, teacher, T), expected)


def test_top_k_keeps_little_and_says_what_it_cannot_do(logits):
    student, teacher = logits
    kept = top_logits(teacher, 5)
    assert [t.dtype for t in kept] == [torch.float16, torch.uint16, torch.float32]
    assert top_logits(torch.randn(1, 2**16 + 1), 2).index_NK.dtype == torch.int32
    with pytest.raises(ValueError, match="top_k=51: the teacher has 50 classes, expected 1 to 50"):
        top_logits(teacher, 51)
    with pytest.raises(ValueError, match=r"temperature=0.4 with top_k: expected at least 0.5"):
        top_k_divergence(student, kept, 0.4)


def test_the_mixture_of_jsd_is_that_of_its_definition(logits):
    student, teacher = (x.double().softmax(-1) for x in logits)
    m = 0.3 * teacher + 0.7 * student
    expected = 0.3 * (teacher * (teacher / m).log()).sum(-1) + 0.7 * (student * (student / m).log()).sum(-1)
    assert_close(logit_divergence(*logits, 1.0, "jsd", 0.3), expected.float(), rtol=1e-4, atol=1e-6)


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
