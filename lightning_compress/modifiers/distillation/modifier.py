r"""Distillation: the model learns from a teacher while it trains.

    L = (1 - a) L_task + a [ D(teacher logits, student logits) + w_h sum_l d(h_l) + w_a sum_l KL(attention_l) ]

Hinton et al. 2015, arXiv:1503.02531 (logits); Romero et al. 2015, arXiv:1412.6550 (hidden states through a learned
projection); Jiao et al. 2020, arXiv:1909.10351 (attention maps). The divergences are in divergence.py.

A hook observes the student's forward; the teacher gets the same inputs. The modifier holds the teacher: it is in eval
mode, never trains, and is in neither ``state_dict`` nor optimizer nor DDP.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.layers.outputs import logits_of
from lightning_compress.layers.sharded import shard_alike
from lightning_compress.modifiers.distillation.answer_cache import AnswerCache
from lightning_compress.modifiers.distillation.cached_answers import Recall
from lightning_compress.modifiers.distillation.divergence import (
    POWERS,
    Divergence,
    TopLogits,
    attention_distance,
    hidden_distance,
    logit_divergence,
    masked_mean,
    top_k_divergence,
    top_logits,
)
from lightning_compress.modifiers.distillation.frozen_teacher import FrozenTeacher
from lightning_compress.modifiers.distillation.hidden_states import HiddenPairs
from lightning_compress.modifiers.distillation.model_outputs import (
    ask_for_attention,
    attention_maps,
    check_attention,
    inputs_of,
    is_causal,
    token_mask,
)
from lightning_compress.modifiers.distillation.projections import Projections
from lightning_compress.pruning.schedules import Schedule, progress, value_at
from lightning_compress.team import Team

__all__ = ["DistillationModifier"]

CACHED = 64  # logits in a cache without top_k


class DistillationModifier(Modifier):
    """Add the distance from a teacher to the loss.

    Args:
        teacher: ``"self"`` (a copy of the model when the window opens), a module, a callable with the model's
            arguments, the path of a checkpoint (``.ckpt``, ``.pt``, ``.safetensors``) for a copy of the model, or a
            Hugging Face folder.
        weight: a, the share of distillation in the loss, in [0, 1], at the end of its schedule.
        init_weight: The share when the window opens; None: ``weight`` from the start.
        schedule: Curve of the share from ``init_weight`` to ``weight`` over the window.
        temperature: T of the softmax.
        divergence: ``forward``, ``reverse`` or ``jsd``; None: no distillation of logits.
        beta: Share of the teacher in the mixture of ``jsd``; 0.5 is Jensen-Shannon.
        top_k: Number of the teacher's likeliest classes that are compared one by one, all others as one; None: all
            classes one by one.
        cache_dir: Folder for the top logits of every sample, so that the teacher runs in the first epoch only;
            ``top_k`` is 64 by default there. Not with ``hidden`` and ``attention_weight``.
        cache_limit_gib: Largest size of a teacher's cache on disk, in GiB, for all ranks together.
        class_dim: Dimension of the logits that holds the classes; 1 for maps [batch, classes, height, width].
        hidden: Pairs of module names, student's to teacher's, whose outputs are compared.
        hidden_weight: w_h.
        hidden_distance: ``mse`` (normalized) or ``cosine``.
        feature_dim: Dimension of the hidden states that holds the features; None: 1 where they have 4 or 5 dimensions
            (convolutions), else the last.
        attention_weight: w_a; above 0 both models must return attention maps (eager attention in Hugging Face's).
        projection_lr: Learning rate of the projections between hidden states of different widths. They train with a
            separate AdamW, are saved with the run, and never exported.
        ignore_index: Label of tokens that do not count; padding (attention_mask) does not count either.
        shift_labels: True: the label of a token is at the next token; None: in causal Hugging Face models.
        mask_key: Name of one more mask in the batch or the call, with 1 for tokens that count.
        teacher_dtype: Dtype of the teacher, ``bfloat16``, ``float16`` or ``float32``; None: unchanged.
        teacher_device: Device of the teacher; None: that of the student.
        start: When distillation begins; the default is the first batch.

    Raises:
        ValueError: A share outside of [0, 1], T <= 0, no distance is chosen, a teacher file that is missing or that
            only unpickling could read, shapes of the two models that do not fit, a loss that is not finite.
    """

    teacher: Any = "self"
    weight: float = Field(default=0.5, ge=0, le=1)
    init_weight: float | None = Field(default=None, ge=0, le=1)
    schedule: Schedule = "constant"
    temperature: float = Field(default=1.0, gt=0)
    divergence: Divergence | None = "forward"
    beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: int | None = Field(default=None, ge=1)
    cache_dir: str | None = None
    cache_limit_gib: float = Field(default=20.0, gt=0)
    class_dim: int = -1
    hidden: dict[str, str] = Field(default_factory=dict)
    hidden_weight: float = Field(default=1.0, ge=0)
    hidden_distance: Literal["mse", "cosine"] = "mse"
    feature_dim: int | None = None
    attention_weight: float = Field(default=0.0, ge=0)
    projection_lr: float = Field(default=1e-3, gt=0)
    ignore_index: int = -100
    shift_labels: bool | None = None
    mask_key: str | None = None
    teacher_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    teacher_device: str | None = None
    start: float | None = 0.0

    _teacher: FrozenTeacher | None = PrivateAttr(default=None)
    _teacher_hash: str = PrivateAttr(default="")
    _restored: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # weights of a copy made in mid-run
    _call: tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], Any] | None = PrivateAttr(default=None)
    _hidden: HiddenPairs = PrivateAttr(default_factory=lambda: HiddenPairs({}, None, Projections(0.0)))
    _recall: Recall | None = PrivateAttr(default=None)
    _epochs: list[list[int]] | None = PrivateAttr(default=None)  # of the run that this one continues
    _epoch: int | None = PrivateAttr(default=None)
    _placed: bool = PrivateAttr(default=False)  # the teacher is sharded as the model is, if that is

    @model_validator(mode="after")
    def _arguments_fit(self) -> "DistillationModifier":
        if self.divergence is None and not self.hidden and not self.attention_weight:
            raise ValueError("nothing to distil: give divergence, hidden or attention_weight")
        if (self.init_weight is None) != (self.schedule == "constant"):
            raise ValueError(
                f"init_weight={self.init_weight} with schedule={self.schedule!r}: a share that changes needs both, "
                f"such as init_weight=0.9, schedule='linear'"
            )
        if self.init_weight is not None and self.end is None:
            raise ValueError("init_weight needs end: the share reaches weight when the window closes")
        if self.update is not None:
            raise ValueError(f"update={self.update}: distillation acts on every batch of its window; leave update out")
        if self.cache_dir is not None and (self.divergence is None or self.hidden or self.attention_weight):
            raise ValueError("cache_dir keeps logits: hidden and attention_weight need the teacher in every batch")
        if self._top_count and self.temperature < 1 / POWERS[-1]:
            raise ValueError(f"temperature={self.temperature} with top_k or cache_dir: at least {1 / POWERS[-1]}")
        return self

    @property
    def needs(self) -> Needs:
        late = f"teacher='self' copies the model at start={self.start}, when a rank holds shards of it; use start=0"
        return Needs(sharded=late if self._copied_late else True)

    @property
    def _top_count(self) -> int | None:
        return self.top_k or (CACHED if self.cache_dir is not None else None)

    @property
    def _copied_late(self) -> bool:
        """True where the teacher is a partly trained model, which another process cannot build anew."""
        return self.teacher == "self" and bool(self.start)

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        """A copy of the model must be unchanged by other modifiers, with shapes that a later process can build."""
        if self.teacher != "self":
            return None
        at_set_up = other.start == 0 and other.end is None
        if earlier and (other.needs.parametrizes or (other.needs.changes_shapes and at_set_up)):
            return (
                "teacher='self' would copy a model that another modifier has changed already: let "
                "DistillationModifier stand before it in the recipe"
            )
        cut = other.start if other.needs.changes_shapes else None
        if cut is not None and self.start and other.unit == self.unit and (at_set_up or cut < self.start):
            return (
                f"teacher='self' copies the model at {self.start:g} (unit: {self.unit}), when its shapes have changed, "
                f"and no later process could build that copy: start distillation at 0, or give the teacher as a file"
            )
        return None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        source = self.teacher if state.teacher_model is None else state.teacher_model
        self._teacher = FrozenTeacher(source, state.model, self.teacher_dtype, self.teacher_device)
        if self._teacher.module is not None:
            self._check_sizes(state.model, self._teacher.module)
        elif self.cache_dir is not None:
            raise ValueError(
                f"cache_dir needs a teacher that is a module or a file: {self.teacher!r} cannot be recognized in the "
                f"next run; leave out cache_dir"
            )
        if self.attention_weight:
            check_attention(state.model)
        self._hidden = HiddenPairs(self.hidden, self.feature_dim, Projections(self.projection_lr))
        self._hidden.check(state.model, self._teacher.module)
        self._teacher_hash = "" if self._copied_late else self._teacher.hash
        return True

    def _check_sizes(self, model: nn.Module, teacher: nn.Module) -> None:
        size, teacher_size = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (model, teacher))
        if self.divergence is not None and size and teacher_size and size != teacher_size:
            raise ValueError(
                f"the teacher's vocabulary has {teacher_size} tokens, the model's {size}: expected one vocabulary; "
                f"distil hidden states instead (divergence=None, hidden=...)"
            )

    # -- while training ------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hook the student, and the teacher's hidden states."""
        assert self._teacher is not None
        if self._copied_late:
            self._teacher.copy_weights(self._restored or state.model.state_dict())
            self._teacher_hash, self._restored = self._teacher.hash, {}
        if self.cache_dir is not None:
            identity = {
                "teacher": self._teacher.hash, "top_k": self._top_count, "powers": POWERS, "class_dim": self.class_dim,
            }  # fmt: skip
            cache = AnswerCache(self.cache_dir, identity, self.cache_limit_gib * 2**30)
            self._recall = Recall(cache)
            self._recall.epochs = self._epochs or self._recall.epochs
        self.hook(state.model, self._remember_call, "forward", with_kwargs=True)
        if self.attention_weight:
            self.hook(state.model, ask_for_attention, "forward_pre", with_kwargs=True)
        self._hidden.watch(state.model, self._teacher.module, self.hook)

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            if self._recall is not None:
                self._count_epoch(event)
            if not self._placed and self._teacher is not None and self._teacher.module is not None:
                shard_alike(self._teacher.module, state.model)
            self._placed = True
        elif event.type_ == EventType.LOSS_CALCULATED:
            self._add_to_loss(state, event)
        elif event.type_ == EventType.OPTIM_PRE_STEP:
            self._hidden.projections.before_step()
        elif event.type_ == EventType.OPTIM_POST_STEP:
            self._hidden.projections.step()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        self._close_cache(state)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._close_cache(state)
        self._teacher, self._call = None, None
        return True

    def remove_hooks(self, *modules: nn.Module) -> None:
        super().remove_hooks(*modules)
        if not modules:
            self._hidden.unwatch()

    def share_at(self, index: float) -> float:
        """The share a at a point in time."""
        if self.init_weight is None or self.end is None or self.start is None:
            return self.weight
        return value_at(self.schedule, progress(index, self.start, self.end), self.init_weight, self.weight)

    def _count_epoch(self, event: Event) -> None:
        epoch = event.epoch if event.steps_per_epoch else 0
        if self._epoch is not None and epoch > self._epoch:
            assert self._recall is not None
            self._recall.close_epoch()
        self._epoch = epoch

    def _close_cache(self, state: State) -> None:
        if self._recall is not None:
            self._recall.close_epoch()
            self._recall.cache.close()
            state.ledger.add("model", "distillation", flag=self._recall.summary)
            self._epochs, self._recall = self._recall.epochs, None

    def _add_to_loss(self, state: State, event: Event) -> None:
        assert state.loss is not None
        if self._call is None:
            raise ValueError(
                "the model's forward was not called in this training step; if training_step calls a submodule instead, "
                "name it with module= in CompressionCallback; code that was compiled before the fit calls no hooks"
            )
        (named, args, kwargs, student), self._call = self._call, None
        distance = self._distance(state, event, named, args, kwargs, student)
        if not torch.isfinite(distance):
            raise ValueError(
                f"the distillation loss is {distance.item()} at step {event.global_step}: expected a finite number; "
                f"look at the teacher's logits, or raise the temperature"
            )
        share = self.share_at(event.current_index)
        with torch.autocast(distance.device.type, enabled=False):
            self._hidden.projections.collect(distance / event.batches_per_step)
            state.loss.mul_(1 - share).add_(share * distance.to(state.loss) / event.batches_per_step)

    def _distance(
        self, state: State, event: Event, named: dict[str, Any], args: Any, kwargs: dict[str, Any], student: Any
    ) -> Tensor:
        assert self._teacher is not None
        teacher = self._teacher
        shift = is_causal(state.model) if self.shift_labels is None else self.shift_labels

        def mean(per_token: Tensor) -> Tensor:
            shape, index, key = tuple(per_token.shape), self.ignore_index, self.mask_key
            mask = token_mask(named, state.batch_data, shape, ignore_index=index, shift=shift, key=key)
            return masked_mean(per_token, mask if mask is None else mask.to(per_token.device))

        def ask() -> Any:
            return teacher.ask(args, kwargs)

        assert state.loss is not None
        total = torch.zeros((), device=state.loss.device, dtype=torch.float32)
        answer = None if self._recall is not None else ask()
        if self.divergence is not None:
            logits = logits_of(student, self.class_dim)
            if self._top_count is None:
                teacher_logits = self._fitting(logits, answer)
                per_token = logit_divergence(logits, teacher_logits, self.temperature, self.divergence, self.beta)
            else:
                top = self._top(logits, named, event, ask if answer is None else lambda: answer)
                per_token = top_k_divergence(logits, top, self.temperature, self.divergence, self.beta)
            total = total + mean(per_token)
        for hidden, teacher_hidden in self._hidden.take():
            total = total + self.hidden_weight * mean(hidden_distance(hidden, teacher_hidden, self.hidden_distance))
        if self.attention_weight:
            for map_, teacher_map in attention_maps(student, answer):
                total = total + self.attention_weight * mean(attention_distance(map_, teacher_map.to(map_.device)))
        return total

    def _fitting(self, logits: Tensor, answer: Any) -> Tensor:
        teacher_logits = logits_of(answer, self.class_dim).to(logits.device)
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(teacher_logits.shape)}, the student's {tuple(logits.shape)}: "
                f"expected one vocabulary; distil hidden states instead (divergence=None, hidden=...)"
            )
        return teacher_logits

    def _top(self, logits: Tensor, named: dict[str, Any], event: Event, ask: Callable[[], Any]) -> TopLogits:
        """The teacher's likeliest classes, in the shape of the student's logits; from the cache where it has them."""
        assert self._top_count is not None
        k = self.top_k or min(self._top_count, logits.shape[-1])

        def fresh() -> dict[str, Tensor]:
            top = top_logits(self._fitting(logits, ask()), k)
            if not torch.isfinite(top.log_p_NK).all():
                raise ValueError(
                    f"the distillation loss is nan at step {event.global_step}: expected a finite number; look at the "
                    f"teacher's logits"
                )
            return {n: t.reshape(len(logits), -1, t.shape[-1]) for n, t in top._asdict().items()}

        recall, steps = self._recall, event.steps_per_epoch
        per_epoch = None if steps is None else steps * event.batches_per_step
        answers = fresh() if recall is None else recall.answers(named, logits.shape[:-1], fresh, per_epoch)
        return TopLogits(**{n: t.to(logits.device).view(*logits.shape[:-1], t.shape[-1]) for n, t in answers.items()})

    def _remember_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():  # not module.training: models of from_pretrained train in eval mode
            self._call = (inputs_of(module, args, kwargs), args, kwargs, output)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Write the teacher's answers in memory to disk first, so that a resumed run has them."""
        if self._recall is not None:
            self._recall.cache.flush()
        late = self._copied_late and self._started and not self._ended
        module = None if self._teacher is None else self._teacher.module
        return {
            **super().state_dict(),
            "teacher": self._teacher_hash,
            "teacher_weights": dict(module.state_dict()) if late and module is not None else self._restored,
            "projections": self._hidden.projections.state_dict(),
            "epochs": self._recall.epochs if self._recall is not None else self._epochs,
            "epoch": self._epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["teacher"] and self._teacher_hash and state["teacher"] != self._teacher_hash:
            raise ValueError(
                f"the checkpoint was trained with the teacher {state['teacher'][:12]}, this run has "
                f"{self._teacher_hash[:12]}: resume with the same teacher (teacher='self' is the model as it is built, "
                f"so build it with the same weights: the same seed before it is built, or the same pretrained file)"
            )
        self._restored = dict(state["teacher_weights"])
        if state["projections"] is not None:
            self._hidden.projections.load_state_dict(state["projections"])
        self._epochs, self._epoch = copy.deepcopy(state["epochs"]), state["epoch"]
        if self._epochs and Team.present().rank > 0:  # rank zero counted the open epoch for itself alone
            self._epochs[-1] = [0, 0]
        if self._recall is not None and self._epochs:  # a window that opens at 0 has opened already
            self._recall.epochs = self._epochs
