"""The causal language model of the benches: its calibration rows, its evaluation windows, its loss and its divergence.

SmolLM2-135M (576 columns: groups of 64 fit, of 128 do not), texts as material.py makes them. A window is T tokens
without BOS, and all but its first are predicted.
Letters: B windows, T tokens of a window, V vocabulary, K kept logits.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EVALUATION_TEXTS = ("eval_tech", "eval_prose")


def calibration_rows(tokenizer: Any, texts: Path, rows: int, length: int, subset: int = 0, subsets: int = 3) -> Tensor:
    """Rows spread evenly over the calibration text; subsets share no token.

    Args:
        tokenizer: Of the model.
        texts: Folder with ``calib_mix.txt``.
        rows: How many.
        length: Tokens of a row.
        subset: Which of the ``subsets`` disjoint draws.
        subsets: Into how many the text is divided.

    Returns:
        int64, [rows, length].
    """
    ids = tokenizer((texts / "calib_mix.txt").read_text(encoding="utf8"), add_special_tokens=False)["input_ids"]
    stride = len(ids) // rows
    shift = subset * (stride // subsets)
    if stride // subsets < length:
        raise SystemExit(f"{rows} rows x {length} tokens x {subsets} subsets do not fit into {len(ids)} tokens")
    return torch.tensor([ids[row * stride + shift :][:length] for row in range(rows)])


def evaluation_windows(tokenizer: Any, texts: Path, name: str, windows: int, length: int = 512) -> Tensor:
    """The first ``windows`` x ``length`` tokens of an evaluation text: int64, [windows, length]."""
    ids = tokenizer((texts / f"{name}.txt").read_text(encoding="utf8"), add_special_tokens=False)["input_ids"]
    if len(ids) < windows * length:
        raise SystemExit(f"{name} has {len(ids)} tokens, {windows} windows of {length} were asked for")
    return torch.tensor(ids[: windows * length]).view(windows, length)


def windows_of_all(tokenizer: Any, texts: Path, windows: int) -> Tensor:
    """Windows of 512 tokens of every evaluation text, one text behind the other: int64, [texts * windows, 512]."""
    return torch.cat([evaluation_windows(tokenizer, texts, name, windows) for name in EVALUATION_TEXTS])


def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token) of each window: float64, [B]."""
    return torch.stack([token_losses(logits_of(model, window), window).mean() for window in windows])


def perplexity(losses: Tensor) -> float:
    """Perplexity over windows of equal length."""
    return math.exp(losses.mean().item())


@dataclass(frozen=True)
class DenseLogits:
    """What is kept of the dense model's prediction at each token: its K likeliest classes, and the mass of the rest.

    Args:
        classes: int32, [B, T-1, K].
        log_p: float32, [B, T-1, K]; natural logarithm.
        rest: float32, [B, T-1]; logarithm of the probability of all other classes together.
        losses: float64, [B]; the dense model's own mean loss.
    """

    classes: Tensor
    log_p: Tensor
    rest: Tensor
    losses: Tensor


@torch.no_grad()
def dense_logits(model: nn.Module, windows: Tensor, keep: int = 512) -> DenseLogits:
    """Run the dense model once and keep the top of its predictions."""
    tops, losses = [], []
    for window in windows:
        log_p_TV = logits_of(model, window).log_softmax(-1)
        top = log_p_TV.topk(keep, dim=-1)
        tops.append((top.indices.int(), top.values, log_rest(top.values)))
        losses.append(token_losses(log_p_TV, window).mean())
    classes, log_p, rest = (torch.stack(parts) for parts in zip(*tops, strict=True))
    return DenseLogits(classes, log_p, rest, torch.stack(losses))


@torch.no_grad()
def divergence(model: nn.Module, windows: Tensor, dense: DenseLogits) -> tuple[Tensor, Tensor]:
    """KL(dense || model) over K + 1 classes (the kept ones, and the rest as one), and the model's loss.

    The lumped sum is never above the full divergence, and equals it as K grows to V.

    Returns:
        Mean KL in nats per token and mean negative log-likelihood, float64, [B] each.
    """
    kl, losses = [], []
    for window, classes, log_p, rest in zip(windows, dense.classes, dense.log_p, dense.rest, strict=True):
        log_q_TV = logits_of(model, window).log_softmax(-1)
        log_q = log_q_TV.gather(-1, classes.long())
        top = (log_p.double().exp() * (log_p - log_q).double()).sum(-1)
        tail = rest.double().exp() * (rest - log_rest(log_q)).double()
        kl.append((top + tail).mean())
        losses.append(token_losses(log_q_TV, window).mean())
    return torch.stack(kl), torch.stack(losses)


@torch.no_grad()
def logits_of(model: nn.Module, window: Tensor) -> Tensor:
    """Logits that predict tokens 1..T-1 of one window: float32, [T-1, V]."""
    return model(input_ids=window[None], use_cache=False).logits[0, :-1].float()


def token_losses(logits_TV: Tensor, window: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens that came: float64, [T-1]. Log-probabilities do as logits."""
    return nn.functional.cross_entropy(logits_TV, window[1:], reduction="none").double()


def log_rest(log_p: Tensor) -> Tensor:
    """log(1 - sum of p), from the logarithms of the kept probabilities; never below that of 1e-12."""
    return (1 - log_p.double().exp().sum(-1)).clamp_min(1e-12).log().float()


def load(folder: Path) -> nn.Module:
    """The checkpoint in fp32, in plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
