"""How good a model is, before and after: perplexity of a causal language model, else the model's own metric.

A language model is measured per token, so that the difference of two measurements on the same tokens comes with its
error. Tokens of one sequence are not independent: the standard error treats sequences as the units (a ratio estimator,
Cochran, Sampling Techniques, 3rd ed., eq. 6.9). With d_s the summed difference of sequence s and n_s its tokens::

    mean = sum d_s / sum n_s        error^2 = S / (S - 1) * sum (d_s - n_s mean)^2 / (sum n_s)^2

A sequence that was measured several times tells nothing new: where each rank reads the whole loader, it is one unit.

Any other model is measured by its ``validation_step``: what that logs is recorded here and goes nowhere else. If it
logs nothing, what ``on_validation_epoch_end`` logs counts, and after that the loss that the step returns.

What ranks must add up is a state of a torchmetrics Metric, which does it when it computes: every rank calls these
functions on its share.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric
from torchmetrics.utilities import dim_zero_cat

from lightning_compress.layers.forward import eval_mode, patched

__all__ = ["Batch", "Measurement", "batches_of", "compare", "evaluate", "is_causal_lm", "metric_states_kept"]

CPU = torch.device("cpu")
LOG = inspect.signature(LightningModule.log)
EXTREMES = {"max": MaxMetric, "amax": MaxMetric, "min": MinMetric, "amin": MinMetric}  # by reduce_fx


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Args:
        values: Every metric by name; the first is the one to show.
        nll: Negative log-likelihood of each token, float32 [N], on the CPU; None for what is not a language model.
        lengths: Tokens of each sequence, int64 [S]; they add up to N.
        batches: Number of batches that were measured.
    """

    values: dict[str, float] = field(default_factory=dict)
    nll: Tensor | None = None
    lengths: Tensor | None = None
    batches: int = 0


class Batch(NamedTuple):
    """A batch on the device and its number in its loader, with the number of that; None where there is only one."""

    data: Any
    batch_idx: int
    dataloader_idx: int | None


def batches_of(
    loaders: Sequence[Iterable[Any]], limits: Sequence[int | None], transfer: Callable[[Any, int], Any]
) -> Iterator[Batch]:
    """The batches of all loaders, one loader after the other.

    Args:
        loaders: Validation loaders.
        limits: Number of batches of each loader; None: all.
        transfer: Moves a batch of the loader with that number to the device.
    """
    for number, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        for index, batch in enumerate(islice(loader, limit)):
            yield Batch(transfer(batch, number), index, number if len(loaders) > 1 else None)


def evaluate(
    root: LightningModule,
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[nn.Module, Any], Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    monitor: str | None = None,
    device: torch.device = CPU,
    progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Measure a model; weights, metric states and the train/eval modes are afterwards as they were.

    Args:
        root: The LightningModule, for its metric.
        module: The model inside it.
        batches: Batches of validation, as :func:`batches_of` gives them.
        forward: Runs ``module`` on a batch.
        context: Entered around each step (precision).
        monitor: The metric to put first.
        device: Device on which ranks add up.
        progress: Called with the number of measured batches.
    """
    remaining = iter(batches)
    with torch.no_grad(), eval_mode(root):
        first = next(remaining, None)
        if first is None:
            return Measurement()
        counted = _counted(chain([first], remaining), progress)
        if _reads_tokens(module, first.data):
            with context():
                logits = getattr(forward(module, first.data), "logits", None)
            if logits is not None and logits.ndim == 3 and logits.shape[:2] == first.data["input_ids"].shape:
                return _perplexity(module, counted, forward, context, device)
        return _own_metric(root, counted, context, monitor, device)


def _counted(batches: Iterable[Batch], progress: Callable[[int], None]) -> Iterator[Batch]:
    for number, batch in enumerate(batches, 1):
        yield batch
        progress(number)


def compare(before: Measurement, after: Measurement, device: torch.device = CPU) -> dict[str, Any]:
    """The change of each metric, as primitives.

    Args:
        before: The dense model.
        after: The compressed model, measured on the same batches.
        device: Device on which ranks add up.

    Returns:
        ``metric``: {name: {before, after, difference, standard_error}}, the error None where it is unknown (metrics
        that are not a mean over tokens, fewer than two sequences); ``evaluated_batches``; of a language model
        ``evaluated_tokens`` and (different) ``evaluated_sequences`` too.
    """
    facts: dict[str, Any] = {"metric": {}, "evaluated_batches": after.batches}
    for name in [n for n in before.values if n in after.values]:
        b, a = before.values[name], after.values[name]
        facts["metric"][name] = {"before": b, "after": a, "difference": a - b, "standard_error": None}
    if before.nll is not None and after.nll is not None and before.lengths is not None:
        a_N, b_N = after.nll.double(), before.nll.double()
        mean = mean_over_tokens(a_N - b_N, b_N, before.lengths, device)
        facts |= {"evaluated_tokens": mean.tokens, "evaluated_sequences": mean.sequences}
        facts["metric"]["nll"]["standard_error"] = mean.error
        # d exp(nll) = exp(nll) d nll (the delta method), at both ends of the pair
        b, a = before.values["perplexity"], after.values["perplexity"]
        slope = mean_over_tokens(a * a_N - b * b_N, b_N, before.lengths, device)
        facts["metric"]["perplexity"]["standard_error"] = slope.error
    return facts


class TokenMean(NamedTuple):
    """A mean over tokens, its standard error (None for fewer than two sequences); all tokens, different sequences."""

    value: float
    error: float | None
    tokens: int
    sequences: int


class TokenMeanMetric(Metric):
    """The ratio estimator of the module's docstring, over all ranks; equal sequences are one unit."""

    full_state_update = False
    sequences: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sequences", [], dist_reduce_fx="cat")

    def update(self, d_N: Tensor, nll_N: Tensor, lengths_S: Tensor) -> None:
        """Add sequences of those lengths, whose tokens have the values d; the dense model's loss tells them apart."""
        sums_2S = [torch.stack([v.double().sum() for v in of_N.split(lengths_S.tolist())]) for of_N in (nll_N, d_N)]
        self.sequences.append(torch.stack([lengths_S.double(), *sums_2S], 1).to(self.device))

    def compute(self) -> TokenMean:
        """The mean and its error."""
        sequences_S3, times_S = dim_zero_cat(self.sequences).unique(dim=0, return_counts=True)
        n_S, _, d_S = (sequences_S3 * times_S.unsqueeze(1)).unbind(1)
        S, N = len(n_S), n_S.sum()
        mean = d_S.sum() / N
        error = (S / (S - 1) * (d_S - n_S * mean).square().sum()).sqrt() / N if S > 1 else None
        return TokenMean(mean.item(), error if error is None else error.item(), int(N), S)


def mean_over_tokens(d_N: Tensor, nll_N: Tensor, lengths_S: Tensor, device: torch.device) -> TokenMean:
    """The mean of d over the tokens of all ranks."""
    metric = TokenMeanMetric().to(device)
    metric.update(d_N, nll_N, lengths_S)
    mean: TokenMean = metric.compute()
    return mean


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
    batches: Iterable[Batch],
    forward: Callable[[nn.Module, Any], Any],
    context: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> Measurement:
    nlls: list[Tensor] = []
    count = 0
    for count, (batch, _, _) in enumerate(batches, 1):  # noqa: B007
        with context():
            logits_BTV = forward(module, batch).logits
        for logits_TV, target_T in zip(logits_BTV, _targets(batch), strict=True):  # one sequence: small memory
            logits_TV, target_T = logits_TV[:-1].float(), target_T[1:]
            nll_T = nn.functional.cross_entropy(logits_TV, target_T, ignore_index=-100, reduction="none")
            nlls.append(nll_T[target_T != -100].cpu())
    nll_N, lengths_S = torch.cat(nlls), torch.tensor([len(n) for n in nlls], dtype=torch.int64, device="cpu")
    nll = mean_over_tokens(nll_N, nll_N, lengths_S, device).value
    perplexity = (
        torch.tensor(nll, dtype=torch.float64, device="cpu").exp().item()
    )  # inf above 709, where math.exp raises
    return Measurement({"perplexity": perplexity, "nll": nll}, nll_N, lengths_S, count)


def _targets(batch: Mapping[str, Any]) -> Tensor:
    """The tokens to predict, -100 where none counts: int64 [B, T]. The caller shifts them."""
    if batch.get("labels") is not None:
        return batch["labels"]
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


# -- any other model --------------------------------------------------------------------------------------------------


class _Recorder:
    """Stands in for ``LightningModule.log`` and keeps what it is given as metrics, which ranks combine."""

    def __init__(self, device: torch.device) -> None:
        self.means: dict[str, Metric] = {}  # and sums
        self.extremes: dict[str, Metric] = {}
        self.metrics: dict[str, Metric] = {}  # objects of the user
        self.suffix = ""
        self.batch_size = 1
        self.device = device

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As ``LightningModule.log``."""
        call = LOG.bind(None, *args, **kwargs)
        call.apply_defaults()
        name, value, reduce = (call.arguments[key] for key in ("name", "value", "reduce_fx"))
        name = f"{name}{self.suffix}" if call.arguments["add_dataloader_idx"] else name
        how = reduce if isinstance(reduce, str) else getattr(reduce, "__name__", "mean")
        if isinstance(value, Metric):
            self.metrics[name] = value
        elif how in EXTREMES:
            self._metric(self.extremes, name, EXTREMES[how]).update(float(value))
        elif how == "sum":
            self._metric(self.means, name, SumMetric).update(float(value))
        else:
            weight = call.arguments["batch_size"] or self.batch_size
            self._metric(self.means, name, MeanMetric).update(float(value), weight)

    def _metric(self, metrics: dict[str, Metric], name: str, kind: type[Metric]) -> Metric:
        if name not in metrics:
            metric = kind(nan_strategy=float("nan"))  # NaN stays NaN; torchmetrics would leave it out
            metrics[name] = metric.set_dtype(torch.float64).to(self.device)
        return metrics[name]

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """As ``LightningModule.log_dict``."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    @property
    def empty(self) -> bool:
        return not (self.means or self.extremes or self.metrics)

    def values(self) -> dict[str, float]:
        metrics = {**dict(sorted(self.means.items())), **self.extremes, **self.metrics}
        computed = {name: metric.compute() for name, metric in metrics.items()}
        return {name: float(value) for name, value in computed.items() if value.numel() == 1}


def _own_metric(
    root: LightningModule,
    batches: Iterable[Batch],
    context: Callable[[], AbstractContextManager[Any]],
    monitor: str | None,
    device: torch.device,
) -> Measurement:
    recorder, losses, count = _Recorder(device), _Recorder(device), 0
    with metric_states_kept(root), patched(root, log=recorder.log, log_dict=recorder.log_dict):
        for count, (batch, index, loader) in enumerate(batches, 1):  # noqa: B007
            recorder.suffix = "" if loader is None else f"/dataloader_idx_{loader}"
            recorder.batch_size = losses.batch_size = _batch_size(batch)
            with context():
                output: Any = root.validation_step(batch, index, *([] if loader is None else [loader]))
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor) and loss.numel() == 1:
                losses.log("loss", loss)
        if recorder.empty:
            getattr(root, "on_validation_epoch_end", lambda: None)()
        values = (losses if recorder.empty else recorder).values()
    order = sorted(values, key=lambda name: name != monitor)
    return Measurement({name: values[name] for name in order}, batches=count)


@contextmanager
def metric_states_kept(root: nn.Module) -> Iterator[None]:
    """Metrics begin empty inside, and have their states back afterwards."""
    metrics = [m for m in root.modules() if isinstance(m, Metric)]
    names = [[*m._defaults, "_computed", "_update_count"] for m in metrics]
    states = [{n: deepcopy(getattr(m, n)) for n in of_one} for m, of_one in zip(metrics, names, strict=True)]
    try:
        for metric in metrics:
            metric.reset()
        yield
    finally:
        for metric, state in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)


def _batch_size(batch: Any) -> int:
    """Length of the first tensor in it; 1 without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    sizes = (_batch_size(b) for b in inner if isinstance(b, Tensor | Mapping | list | tuple))
    return next(sizes, 1)
