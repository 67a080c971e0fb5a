r"""Train what is continuous in a compressed model: scales, norms, biases, end to end, codes and masks fixed.

    min over s, norms, biases    mean over tokens of KL(dense || compressed)        after EfficientQAT's second phase
                                                                                    (Chen et al. 2024, arXiv:2407.11062)

All calibration batches first run through the dense model, whose likeliest classes are kept. After the walk the whole
model trains on them, a share of the batches held out: the best epoch by these is kept, and if none is better than the
start, the model is left as it was.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.matrix import is_supported, parameter_of
from lightning_compress.layers.outputs import logits_of
from lightning_compress.layerwise.parent import first_tensor
from lightning_compress.modifiers.distillation.divergence import TopLogits, masked_mean, top_k_divergence, top_logits
from lightning_compress.modifiers.tune.descent import Settings, Tuned, held_out_batches, tune
from lightning_compress.modifiers.tune.head import Call, Head, by_pieces
from lightning_compress.modifiers.tune.knobs import Knob, TensorKnob, scale_knobs
from lightning_compress.quant.record import Quantized

__all__ = ["TuneModifier"]

logger = logging.getLogger(__name__)


class TuneModifier(Modifier):
    """Train scales, norms and biases of a compressed model on its distance from the dense one.

    Place it last in the recipe, after quantizers or one-shot pruners. Memory holds the model and the activations of one
    block; a run takes about three forward passes for each epoch.

    Args:
        scales: Train the scales of quantized weights, and static ones of inputs. Powers of two (MXFP4) stay.
        vectors: Train parameters with one dimension: norms and biases.
        sparse_weights: Train the nonzero weights of layers that were pruned and not quantized, with Adam's two moments.
        epochs: Passes over the calibration batches that are not held out, at most.
        lr: Relative size of a step at the start; it falls to zero along a cosine.
        accumulate: Batches of a step; each of several processes runs its share of them.
        held_out: Share of the batches that decides which epoch is the best; at least one batch.
        patience: Epochs without a gain on the held-out batches after which it ends.
        loss: ``kl`` (of logits) or ``mse`` (of the output, relative), for models without classes.
        top_k: Likeliest classes of the dense model that are kept for each token, beside the mass of the others. None:
            all.
        class_dim: Dimension of the classes in the logits.
        seed: Of the order of batches.
    """

    scales: bool = True
    vectors: bool = True
    sparse_weights: bool = False
    epochs: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-3
    accumulate: Annotated[int, Field(ge=1)] = 1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.125
    patience: Annotated[int, Field(ge=1)] = 2
    loss: Literal["kl", "mse"] = "kl"
    top_k: Annotated[int, Field(ge=1)] | None = 256
    class_dim: int = -1
    seed: int = 0

    _answers: dict[int, TopLogits | Tensor] = PrivateAttr(default_factory=dict)  # of the dense model, by batch
    _last: Call | None = PrivateAttr(default=None)  # of the Linear that ran last
    _head: Head | None = PrivateAttr(default=None)
    _classes: int = PrivateAttr(default=0)

    @property
    def needs(self) -> Needs:
        return Needs(
            data=True, survey=True, after_walk=True, team="sums",
            sharded="it trains on whole weights; tune in a second run, on the exported model",
        )  # fmt: skip

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if not (self.scales or self.vectors or self.sparse_weights):
            raise ValueError(f"{self.name}: scales, vectors and sparse_weights are all false: nothing would be trained")
        return True

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        if earlier or not other.acts_after_training:
            return None
        return f"{other.name} would change what it has trained; place it last"

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for module in state.model.modules() if self.loss == "kl" else ():
            if isinstance(module, nn.Linear) and not module._forward_hooks:
                self.hook(module, self._note_output, "forward")
        self.hook(state.model, self._keep_answer, "forward")

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        counts = state.team.gather(state.batches, "tuning")
        count = sum(counts)
        if count < 2:
            raise ValueError(
                f"{self.name} needs at least two calibration batches, one of them held out, and got {count}; use "
                f"smaller batches, or more samples"
            )
        knobs = self._knobs(state.model)
        if not knobs:
            raise ValueError(
                f"{self.name} found nothing to train: the model has no quantized weights with scales that it can "
                f"train, no norms and no biases; place it after a quantizer"
            )
        held_out = held_out_batches(count, self.held_out)
        numbers = [number for number in range(count) if number not in held_out], held_out
        how = Settings(self.epochs, self.lr, self.accumulate, self.patience, self.seed)

        def loss(number: int) -> Tensor:
            assert state.replay is not None
            return self._distance(partial(state.replay, number // state.team.size), self._answers[number])

        tuned = tune(state.model, knobs, loss, numbers, how, state)
        self._answers, self._head = {}, None
        self._report(state, tuned, len(knobs))

    def _report(self, state: State, tuned: Tuned, count: int) -> None:
        losses, best = tuned.losses, tuned.best
        what = "KL to the dense model" if self.loss == "kl" else "relative error of the output"
        gain = f"{losses[0]:.4g} -> {losses[best]:.4g}, epoch {best} of {len(losses) - 1}" if best else "no gain"
        text = f"{what} on held-out batches: {gain}"
        logger.info("%s: %d tensors; %s", self.name, count, text)
        state.ledger.add("model", "tune", error=losses[best], flag=text)

    def _note_output(self, module: nn.Linear, args: Any, output: Any) -> None:
        self._last = Call(module, output) if isinstance(output, Tensor) else None  # a class of its own

    def _keep_answer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._answers[self.batch_number] = self._answer(output)
        last, self._last = self._last, None
        is_head = last is not None and last.gave(logits_of(output, self.class_dim))
        self._head = Head(last.module) if last is not None and is_head else None

    def _answer(self, output: Any) -> TopLogits | Tensor:
        if self.loss == "mse":
            return first_tensor(output).detach().cpu()
        try:
            logits = logits_of(output, self.class_dim)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}, or loss: mse") from None
        self._classes = V = logits.shape[-1]
        answer = top_logits(logits, V if self.top_k is None else min(self.top_k, V))
        return TopLogits(*(tensor.cpu() for tensor in answer))

    def _distance(self, run: Callable[[], Any], answer: TopLogits | Tensor) -> Tensor:
        """The mean loss of the tokens that count; ``run`` gives the output of the model."""
        if isinstance(answer, Tensor):
            student = first_tensor(run())
            teacher = answer.to(student.device)
            each = (student.float() - teacher.float()).square()
            mask = self._fitting(each.shape)
            return masked_mean(each, mask) / masked_mean(teacher.float().square(), mask).clamp_min(1e-20)
        logits = partial(logits_of, class_dim=self.class_dim)
        x = None if self._head is None else self._head.input_of(run, logits)
        x, layer = (logits(run()), nn.Identity()) if self._head is None or x is None else (x, self._head.run)

        def divergence(x: Tensor, *piece: Tensor) -> Tensor:
            return top_k_divergence(layer(x), TopLogits(*piece))

        tensors = (tensor.to(x.device).reshape(-1, tensor.shape[-1]) for tensor in (x, *answer))
        with model_precision():  # of the layer, and again in the backward pass
            each = by_pieces(divergence, self._classes, *tensors).view(x.shape[:-1])
        return masked_mean(each, self._fitting(each.shape))

    def _fitting(self, shape: torch.Size) -> Tensor | None:
        """The mask of tokens that count, where the values have one entry, or one vector, for each token."""
        mask = self.token_mask
        if mask is None or shape[: mask.ndim] != mask.shape:
            return None
        return mask.view(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape)

    def _knobs(self, model: nn.Module) -> list[Knob]:
        knobs = scale_knobs(model) if self.scales else []
        quantized = {parameter_of(module) for module, _ in Quantized.find(model).values()}
        if self.sparse_weights:
            weights = [parameter_of(module) for module in model.modules() if is_supported(module)]
            sparse = [w for w in dict.fromkeys(weights) if w not in quantized and bool((w == 0).any())]
            knobs += [TensorKnob(parameter, sparse=True) for parameter in sparse]
        vectors = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and p not in quantized]
        return knobs + ([TensorKnob(parameter) for parameter in vectors] if self.vectors else [])
