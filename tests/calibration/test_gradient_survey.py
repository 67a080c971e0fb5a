"""Labels that a model draws for itself: their distribution, their gradient, what does not count."""

import pytest
import torch

from lightning_compress.calibration.gradient_survey import sampled_loss


def test_labels_follow_the_softmax_of_the_logits():
    """The gradient of -log p(y) is softmax - onehot(y): from it the labels are read back."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(1, 20_000, 1).requires_grad_()
    sampled_loss(logits, "classes", None, 5).backward()
    p = logits.detach()[0, 0].softmax(-1)
    onehot = p - logits.grad[0]
    assert torch.equal(onehot.round(), torch.nn.functional.one_hot(onehot.argmax(-1), 4).float())
    share = onehot.round().mean(0)
    assert (share - p).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_gradients_of_values_are_normal_noise():
    values = torch.zeros(100, 50, requires_grad=True)
    sampled_loss((values,), "values", None, 5).backward()
    assert abs(values.grad.mean().item()) < 0.05
    assert values.grad.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_a_batch_has_its_own_labels_and_padding_none(kind):
    def gradient(seed, mask=None):
        x = torch.ones(2, 5, 4, requires_grad=True)
        sampled_loss(x, kind, mask, seed).backward()
        return x.grad

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    masked = gradient(1, mask)
    assert torch.equal(masked[mask], gradient(1)[mask])
    assert not masked[~mask].any()


def test_outputs_without_floats_are_refused():
    with pytest.raises(ValueError, match="found no tensor of floats in an output of type dict"):
        sampled_loss({"ids": torch.ones(2, dtype=torch.int64)}, "values", None, 0)
