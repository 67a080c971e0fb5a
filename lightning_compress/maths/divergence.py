r"""How far a student is from its teacher: on logits, on hidden states, on attention maps.

Logits, per token, with temperature T (Hinton et al. 2015, arXiv:1503.02531), p from the teacher and q from the student:

    forward    T^2 KL(p || q)                      covers all that the teacher may say
    reverse    T^2 KL(q || p)                      keeps to what the teacher surely says
    jsd        T^2 [b KL(p || m) + (1-b) KL(q || m)],  m = b p + (1-b) q      (b = 0.5: Jensen-Shannon)

The factor T^2 keeps gradients of one size whatever T is. Shapes: N tokens, V vocabulary, D features, K kept logits.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Divergence", "attention_distance", "hidden_distance", "logit_divergence", "masked_mean", "top_k_divergence"]

Divergence = Literal["forward", "reverse", "jsd"]


def logit_divergence(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, kind: Divergence = "forward", beta: float = 0.5
) -> Tensor:
    """Divergence of each token, [N] float32, zero where the two agree.

    Args:
        student_NV: Logits, any float dtype; computed in float32.
        teacher_NV: Logits of the teacher; no gradient flows to them.
        temperature: T > 0.
        kind: ``forward``, ``reverse`` or ``jsd``.
        beta: Share of the teacher in the mixture of ``jsd``.
    """
    log_q = F.log_softmax(student_NV.float() / temperature, -1)
    log_p = F.log_softmax(teacher_NV.detach().float() / temperature, -1)
    if kind == "forward":
        return temperature**2 * _kl(log_p, log_q)
    if kind == "reverse":
        return temperature**2 * _kl(log_q, log_p)
    weights = torch.tensor([beta, 1 - beta], device=log_p.device).log()
    log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), 0)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def top_k_divergence(student_NV: Tensor, log_p_NK: Tensor, index_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL over the teacher's K likeliest tokens and one bucket for all others, [N]; at most the full KL.

    Args:
        student_NV: Logits of the student.
        log_p_NK: Log-probabilities of the teacher at this temperature.
        index_NK: Their places in the vocabulary.
        temperature: T > 0.
    """
    log_q = F.log_softmax(student_NV.float() / temperature, -1).gather(-1, index_NK)
    log_p = log_p_NK.float()
    kept = _kl(log_p, log_q)
    rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
    return temperature**2 * (kept + rest_p.exp() * (rest_p - rest_q))


def hidden_distance(student_ND: Tensor, teacher_ND: Tensor, kind: Literal["mse", "cosine"] = "mse") -> Tensor:
    """Distance of hidden states, [N]: ||s - t||^2 / ||t||^2, or 1 - cosine."""
    student, teacher = student_ND.float(), teacher_ND.detach().float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher's attention map to the student's, heads averaged first so that their numbers may differ.

    Args:
        student: Attention probabilities, [batch, heads, queries, keys].
        teacher: The same, with its own number of heads.

    Returns:
        [batch, queries].
    """
    q, p = student.float().mean(1).clamp_min(1e-12), teacher.detach().float().mean(1)
    return (p * (p.clamp_min(1e-12).log() - q.log())).sum(-1)


def masked_mean(value: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count; 0 when none does. Both have one entry per token."""
    if mask is None:
        return value.mean()
    mask = mask.to(value.dtype)
    return (value * mask).sum() / mask.sum().clamp_min(1.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - sum p), kept away from -inf."""
    return torch.log((1 - log_p.exp().sum(-1)).clamp_min(1e-12))
