r"""How far a student is from its teacher: on logits, on hidden states, on attention maps.

Logits, per token, with temperature T (Hinton et al. 2015, arXiv:1503.02531), p from the teacher and q from the student:

    forward    T^2 KL(p || q)                      covers all classes that the teacher finds likely
    reverse    T^2 KL(q || p)                      concentrates on the likeliest classes of the teacher
    jsd        T^2 [b KL(p || m) + (1-b) KL(q || m)],  m = b p + (1-b) q      (b = 0.5: Jensen-Shannon)

The factor T^2 keeps the size of gradients independent of T. The same over the teacher's K likeliest classes and one
bucket for all others: never more than the full divergence, and equal to it at K = V.

Shapes: N tokens (any leading dimensions), V vocabulary, D features, K kept logits, B powers.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "POWERS", "Divergence", "TopLogits", "attention_distance", "hidden_distance", "logit_divergence", "masked_mean",
    "tokens_at_once", "top_k_divergence", "top_logits",
]  # fmt: skip

Divergence = Literal["forward", "reverse", "jsd"]

POWERS = (0.25, 0.5, 1.0, 2.0)
"""The 1/T at which the mass of all other classes is known exactly; between them it is interpolated."""
FLOOR = -1e4  # for log 0, which a masked class has: exp(FLOOR) is 0, and 0 * FLOOR is 0
PIECE = 2**22  # logits at a time, 16 MiB in float32
CUDA_PIECE = 2**26  # there each piece costs dozens of launches


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
    return temperature**2 * _divergence(log_p, log_q, kind, beta)


class TopLogits(NamedTuple):
    """The teacher's likeliest classes and the mass of all others, for any temperature from 0.5 up.

    Args:
        log_p_NK: log softmax at T = 1 of the K likeliest classes, float16.
        index_NK: Their indices, int32, or uint16 where that is enough.
        rest_NB: log of the sum of p^b over all other classes, for b in ``POWERS``, float32; -inf when K = V.
    """

    log_p_NK: Tensor
    index_NK: Tensor
    rest_NB: Tensor


def top_logits(teacher_NV: Tensor, k: int) -> TopLogits:
    """The K likeliest classes, and the mass of the others together.

    Raises:
        ValueError: K is not in [1, V].
    """
    V = teacher_NV.shape[-1]
    if not 1 <= k <= V:
        raise ValueError(f"top_k={k}: the teacher has {V} classes, expected 1 to {V}")
    pieces = teacher_NV.detach().reshape(-1, V).split(tokens_at_once(V, teacher_NV.device))
    fields = (torch.cat(field) for field in zip(*(_top_logits(piece, k) for piece in pieces), strict=True))
    return TopLogits(*(field.view(*teacher_NV.shape[:-1], field.shape[-1]) for field in fields))


def _top_logits(teacher_NV: Tensor, k: int) -> tuple[Tensor, ...]:
    V = teacher_NV.shape[-1]
    log_p_NV = F.log_softmax(teacher_NV.float(), -1)
    log_p_NK, index_NK = log_p_NV.topk(k, -1)
    others_NV = log_p_NV.scatter_(-1, index_NK, -torch.inf)
    rest_NB = torch.stack([torch.logsumexp(b * others_NV, -1) for b in POWERS], -1)
    return log_p_NK.clamp_min(FLOOR).half(), index_NK.to(torch.uint16 if V <= 2**16 else torch.int32), rest_NB


def tokens_at_once(classes: int, device: torch.device) -> int:
    """Tokens whose logits are computed together, so that their number does not decide how much memory that takes."""
    return max(1, (CUDA_PIECE if device.type == "cuda" else PIECE) // classes)


def top_k_divergence(
    student_NV: Tensor, teacher: TopLogits, temperature: float = 1.0, kind: Divergence = "forward", beta: float = 0.5
) -> Tensor:
    """Divergence over the teacher's K likeliest classes and one bucket for all others, [N] float32.

    Args:
        student_NV: Logits of the student.
        teacher: Result of :func:`top_logits`.
        temperature: T >= 0.5.
        kind: ``forward``, ``reverse`` or ``jsd``.
        beta: Share of the teacher in the mixture of ``jsd``.

    Raises:
        ValueError: T is below 0.5.
    """
    V, index_NK = student_NV.shape[-1], teacher.index_NK.long()
    log_q_NV = F.log_softmax(student_NV.float() / temperature, -1)
    log_p, log_q = teacher.log_p_NK.float() / temperature, log_q_NV.gather(-1, index_NK)
    if (K := index_NK.shape[-1]) < V:
        rest_p = _rest_at(teacher.rest_NB, 1 / temperature, V - K)
        rest_q = log_q_NV.scatter(-1, index_NK, FLOOR).logsumexp(-1)
        log_p, log_q = torch.cat([log_p, rest_p[..., None]], -1), torch.cat([log_q, rest_q[..., None]], -1)
    return temperature**2 * _divergence(log_p.log_softmax(-1), log_q, kind, beta)


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


def _divergence(log_p: Tensor, log_q: Tensor, kind: Divergence, beta: float) -> Tensor:
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p, log_q = log_p.clamp_min(FLOOR), log_q.clamp_min(FLOOR)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _rest_at(rest_NB: Tensor, power: float, classes: int) -> Tensor:
    """log of the sum of p^power over ``classes`` classes, [N], by the polynomial through its known values.

    It is smooth and convex in the power, and at power 0 it is log(classes).
    """
    if power > POWERS[-1]:
        raise ValueError(
            f"temperature={1 / power:g} with top_k: expected at least {1 / POWERS[-1]:g}, below which the mass of the "
            f"classes that are left out is not known; raise temperature, or leave out top_k and cache_dir"
        )
    nodes = (0.0, *POWERS)
    masked = rest_NB[..., 0].isneginf()  # all other classes are masked
    values = [torch.full_like(rest_NB[..., 0], math.log(classes)), *rest_NB.unbind(-1)]
    total = torch.zeros_like(values[0])
    for node, value in zip(nodes, values, strict=True):
        weight = math.prod((power - other) / (node - other) for other in nodes if other != node)
        if weight:  # at a node the other weights are exactly 0
            total = total + weight * value
    return torch.where(masked, FLOOR, total)
