"""How good a model is, before and after: perplexity of a causal language model, else the model's own metric.

A language model is measured per token, so that the difference of two measurements on the same tokens comes with its
error. Tokens of one sequence are not independent: the standard error treats sequences as the units (a ratio estimator,
Cochran, Sampling Techniques, 3rd ed., eq. 6.9). With d_s the summed difference of sequence s and n_s its tokens::

    mean = sum d_s / sum n_s        error^2 = S / (S - 1) * sum (d_s - n_s mean)^2 / (sum n_s)^2

Any other model is measured by its ``validation_step``: what that logs is recorded here and goes nowhere else. If it
logs nothing, what ``on_validation_epoch_end`` logs counts, and after that the loss that the step returns.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from lightning_compress.layers.forward import eval_mode, patched

__all__ = ["Measurement", "compare", "evaluate", "is_causal_lm"]

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Args:
        values: Every metric by name; the first is the one to show.
        nll: Negative log-likelihood of each token, float32 [N], on the CPU; None for what is no language model.
        lengths: Tokens of each sequence, int64 [S]; they add up to N.
        batches: How many were measured.
    """

    values: dict[str, float] = field(default_factory=dict)
    nll: Tensor | None = None
    lengths: Tensor | None = None
    batches: int = 0


def evaluate(
    root: nn.Module,
    module: nn.Module,
    loaders: Sequence[Iterable[Any]],
    *,
    forward: Callable[[nn.Module, Any], Any],
    limits: Sequence[int | None] | None = None,
    transfer: Callable[[Any, int], Any] = lambda batch, loader: batch,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    step: str = "validation_step",
    monitor: str | None = None,
    total: Sum = lambda t: t,
    progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Measure a model; weights, metric states and the train/eval modes are afterwards as they were.

    Args:
        root: The LightningModule, for its metric.
        module: The model inside it.
        loaders: Validation loaders.
        forward: Runs ``module`` on a batch.
        limits: Batches of each loader; None: all.
        transfer: Moves a batch of the loader with that number to the device.
        context: Entered around each step (precision).
        step: The method of ``root`` that measures a batch.
        monitor: The metric to put first.
        total: Sums a float64 tensor over ranks; every rank must call this function on its share.
        progress: Told the number of batches done.
    """
    batches = _batches(loaders, limits or [None] * len(loaders), transfer)
    with torch.no_grad(), eval_mode(root):
        first = next(batches, None)
        if first is None:
            return Measurement()
        if _reads_tokens(module, first[0]):
            with context():
                logits = getattr(forward(module, first[0]), "logits", None)
            if logits is not None and logits.ndim == 3 and logits.shape[:2] == first[0]["input_ids"].shape:
                return _perplexity(module, first, batches, forward, context, progress)
        return _own_metric(root, first, batches, len(loaders), context, step, monitor, total, progress)


def compare(before: Measurement, after: Measurement, total: Sum = lambda t: t) -> dict[str, Any]:
    """The change of each metric, as primitives.

    Args:
        before: The dense model.
        after: The compressed model, measured on the same batches.
        total: Sums a float64 tensor over ranks.

    Returns:
        ``metric``: {name: {before, after, difference, standard_error}}, the error None where it is unknown (metrics
        that are no mean over tokens, fewer than two sequences); ``evaluated_batches``; of a language model
        ``evaluated_tokens`` and ``evaluated_sequences`` too.
    """
    facts: dict[str, Any] = {"metric": {}, "evaluated_batches": after.batches}
    for name in [n for n in before.values if n in after.values]:
        b, a = before.values[name], after.values[name]
        facts["metric"][name] = {"before": b, "after": a, "difference": a - b, "standard_error": None}
    if before.nll is not None and after.nll is not None and before.lengths is not None:
        a_N, b_N = after.nll.double(), before.nll.double()
        mean = _mean_over_tokens(a_N - b_N, before.lengths, total)
        facts |= {"evaluated_tokens": mean.tokens, "evaluated_sequences": mean.sequences}
        facts["metric"]["nll"]["standard_error"] = mean.error
        # d exp(nll) = exp(nll) d nll (the delta method), at both ends of the pair
        b, a = before.values["perplexity"], after.values["perplexity"]
        slope = _mean_over_tokens(a * a_N - b * b_N, before.lengths, total)
        facts["metric"]["perplexity"]["standard_error"] = slope.error
    return facts


@dataclass(frozen=True)
class _Mean:
    value: float
    error: float | None
    tokens: int
    sequences: int


def _mean_over_tokens(d_N: Tensor, lengths_S: Tensor, total: Sum) -> _Mean:
    """The ratio estimator of the module's docstring."""
    n_S = lengths_S.double()
    d_S = torch.stack([d.sum() for d in d_N.split(lengths_S.tolist())])
    products_KS = torch.stack([torch.ones_like(n_S), n_S, d_S, d_S * d_S, n_S * d_S, n_S * n_S])
    S, N, D, DD, ND, NN = total(products_KS.sum(1)).tolist()
    mean = D / N
    spread = max(DD - 2 * mean * ND + mean**2 * NN, 0.0)
    return _Mean(mean, math.sqrt(S / (S - 1) * spread) / N if S > 1 else None, int(N), int(S))


def is_causal_lm(module: nn.Module) -> bool | None:
    """What the class says: True for ``...ForCausalLM`` and ``...LMHeadModel``, False for another transformers model."""
    names = [c.__name__ for c in type(module).__mro__]
    if any("CausalLM" in n or "LMHead" in n for n in names):
        return True
    return False if "PreTrainedModel" in names else None


# -- language models --------------------------------------------------------------------------------------------------


def _reads_tokens(module: nn.Module, batch: Any) -> bool:
    causal = is_causal_lm(module)
    reads = causal or (causal is None and "input_ids" in inspect.signature(module.forward).parameters)
    return bool(reads) and isinstance(batch, Mapping) and "input_ids" in batch


def _perplexity(
    module: nn.Module,
    first: tuple[Any, int, int],
    rest: Iterable[tuple[Any, int, int]],
    forward: Callable[[nn.Module, Any], Any],
    context: Callable[[], AbstractContextManager[Any]],
    progress: Callable[[int], None],
) -> Measurement:
    metric = Perplexity(ignore_index=-100).to(first[0]["input_ids"].device)
    nlls: list[Tensor] = []
    done = 0
    for batch, _, _ in _chain(first, rest):
        with context():
            logits_BTV = forward(module, batch).logits
        for logits_TV, target_T in zip(logits_BTV, _targets(batch), strict=True):  # one sequence: small memory
            logits_TV, target_T = logits_TV[:-1].float(), target_T[1:]
            metric.update(logits_TV[None], target_T[None])
            nll_T = nn.functional.cross_entropy(logits_TV, target_T, ignore_index=-100, reduction="none")
            nlls.append(nll_T[target_T != -100].cpu())
        done += 1
        progress(done)
    perplexity = metric.compute().item()
    return Measurement(
        values={"perplexity": perplexity, "nll": math.log(perplexity)},
        nll=torch.cat(nlls),
        lengths=torch.tensor([len(n) for n in nlls], dtype=torch.int64),
        batches=done,
    )


def _targets(batch: Mapping[str, Any]) -> Tensor:
    """The tokens to predict, -100 where none counts: int64 [B, T]. The caller shifts them."""
    if batch.get("labels") is not None:
        return batch["labels"]
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


# -- any other model --------------------------------------------------------------------------------------------------


class _Recorder:
    """Stands in for ``LightningModule.log`` and keeps what it is told."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.extremes: dict[str, float] = {}
        self.metrics: dict[str, Metric] = {}
        self.suffix = ""
        self.batch_size = 1

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        name = f"{name}{self.suffix}" if add_dataloader_idx else name
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        value = float(value)
        how = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
        if how in ("max", "amax", "min", "amin"):
            pick = max if "max" in how else min
            self.extremes[name] = pick(self.extremes.get(name, value), value)
            return
        weight = (batch_size or self.batch_size) if how != "sum" else 0
        self.sums[name] = self.sums.get(name, 0.0) + value * (weight or 1)
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    @property
    def empty(self) -> bool:
        return not (self.sums or self.extremes or self.metrics)

    def values(self, total: Sum) -> dict[str, float]:
        names = sorted(self.sums)
        both = torch.tensor([[self.sums[n] for n in names], [self.weights[n] for n in names]], dtype=torch.float64)
        sums, weights = total(both).tolist() if names else ([], [])
        found = {n: s / w if w else s for n, s, w in zip(names, sums, weights, strict=True)}
        computed = {n: m.compute() for n, m in self.metrics.items()}
        return found | self.extremes | {n: float(v) for n, v in computed.items() if v.numel() == 1}


def _own_metric(
    root: nn.Module,
    first: tuple[Any, int, int],
    rest: Iterable[tuple[Any, int, int]],
    loaders: int,
    context: Callable[[], AbstractContextManager[Any]],
    step: str,
    monitor: str | None,
    total: Sum,
    progress: Callable[[int], None],
) -> Measurement:
    recorder, losses, done = _Recorder(), _Recorder(), 0
    with _metric_states_kept(root), patched(root, log=recorder.log, log_dict=recorder.log_dict):
        for batch, index, loader in _chain(first, rest):
            recorder.suffix = f"/dataloader_idx_{loader}" if loaders > 1 else ""
            recorder.batch_size = losses.batch_size = _batch_size(batch)
            with context():
                output = getattr(root, step)(batch, index, *([loader] if loaders > 1 else []))
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor) and loss.numel() == 1:
                losses.log("loss", loss)
            done += 1
            progress(done)
        if recorder.empty:
            getattr(root, f"on_{step.removesuffix('_step')}_epoch_end", lambda: None)()
        values = (losses if recorder.empty else recorder).values(total)
    order = sorted(values, key=lambda name: name != monitor)
    return Measurement(values={name: values[name] for name in order}, batches=done)


@contextmanager
def _metric_states_kept(root: nn.Module) -> Iterator[None]:
    """Metrics begin empty inside, and have their states back afterwards."""
    metrics = [m for m in root.modules() if isinstance(m, Metric)]
    names = [[*m._defaults, "_computed", "_update_count"] for m in metrics]
    kept = [{n: deepcopy(getattr(m, n)) for n in own} for m, own in zip(metrics, names, strict=True)]
    try:
        for metric in metrics:
            metric.reset()
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)


# -- batches and modes ------------------------------------------------------------------------------------------------


def _batches(
    loaders: Sequence[Iterable[Any]], limits: Sequence[int | None], transfer: Callable[[Any, int], Any]
) -> Iterator[tuple[Any, int, int]]:
    """Each batch on the device, its index, and its loader's."""
    for number, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        for index, batch in enumerate(islice(loader, limit)):
            yield transfer(batch, number), index, number


def _chain(first: tuple[Any, int, int], rest: Iterable[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
    yield first
    yield from rest


def _batch_size(batch: Any) -> int:
    """Length of the first tensor in it; 1 without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    sizes = (_batch_size(b) for b in inner if isinstance(b, Tensor | Mapping | list | tuple))
    return next(sizes, 1)
