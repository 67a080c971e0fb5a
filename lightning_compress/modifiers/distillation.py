r"""Distillation: the model learns from a teacher while it trains.

    L = (1 - a) L_task + a [ D(teacher logits, student logits) + w_h sum_l d(h_l) + w_a sum_l KL(attention_l) ]

Hinton et al. 2015, arXiv:1503.02531 (logits); Romero et al. 2015, arXiv:1412.6550 (hidden states through a learned
projection); Jiao et al. 2020, arXiv:1909.10351 (attention maps). The divergences are in maths/divergence.py.

The student's forward is watched by a hook; the teacher sees the same inputs. The teacher lives on this modifier: it is
in eval mode, never trains, and enters neither ``state_dict`` nor optimizer nor DDP.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.maths.divergence import (
    Divergence,
    attention_distance,
    hidden_distance,
    logit_divergence,
    masked_mean,
)
from lightning_compress.maths.schedules import Schedule, progress, value_at

__all__ = ["DistillationModifier"]


class DistillationModifier(Modifier):
    """Add a teacher's knowledge to the loss.

    Args:
        teacher: ``"self"`` (a copy of the model as it is at set-up), a module, a callable with the model's arguments,
            the path of a checkpoint (``.ckpt``, ``.pt``, ``.safetensors``) for a copy of the model, or a Hugging Face
            folder.
        weight: a, the share of distillation in the loss, in [0, 1], at the end of its schedule.
        init_weight: The share when the window opens; None: ``weight`` from the start.
        schedule: How the share goes from ``init_weight`` to ``weight`` over the window.
        temperature: T of the softmax.
        divergence: ``forward``, ``reverse`` or ``jsd``; None: no distillation of logits.
        hidden: Pairs of module names, student's to teacher's, whose outputs shall agree.
        hidden_weight: w_h.
        hidden_distance: ``mse`` (normalized) or ``cosine``.
        attention_weight: w_a; above 0 both models must return attention maps (eager attention in Hugging Face's).
        projection_lr: Learning rate of the projections between hidden states of different widths. They train with an
            AdamW of their own, are saved with the run, and never exported.
        ignore_index: Tokens whose label this is do not count; nor does padding (attention_mask).
        teacher_dtype: ``bfloat16``, ``float16`` or ``float32``: what the teacher computes in; None: as it is.
        teacher_device: Where the teacher lives; None: with the student.
        start: When distillation begins; the default is the first batch.

    Raises:
        ValueError: A share outside of [0, 1], T <= 0, nothing to distil, a teacher file that is missing or that only
            unpickling could read, shapes of the two models that do not fit, a loss that is not finite.
    """

    teacher: Any = "self"
    weight: float = 0.5
    init_weight: float | None = None
    schedule: Schedule = "constant"
    temperature: float = 1.0
    divergence: Divergence | None = "forward"
    hidden: dict[str, str] = Field(default_factory=dict)
    hidden_weight: float = 1.0
    hidden_distance: Literal["mse", "cosine"] = "mse"
    attention_weight: float = 0.0
    projection_lr: float = 1e-3
    ignore_index: int = -100
    teacher_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    teacher_device: str | None = None
    start: float | None = 0.0

    _teacher: Callable[..., Any] | None = PrivateAttr(default=None)
    _teacher_hash: str = PrivateAttr(default="")
    _teacher_hooks: list[Any] = PrivateAttr(default_factory=list)
    _call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = PrivateAttr(default=None)
    _student_hidden: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _teacher_hidden: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _projections: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)
    _optimizer: torch.optim.Optimizer | None = PrivateAttr(default=None)
    _restored: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _arguments_fit(self) -> "DistillationModifier":
        for name, value in (("weight", self.weight), ("init_weight", self.init_weight)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a share of the loss: it must lie in [0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.divergence is None and not self.hidden and not self.attention_weight:
            raise ValueError("nothing to distil: give divergence, hidden or attention_weight")
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        teacher = state.teacher_model or self._build_teacher(state.model)
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
            teacher.to(device=self.teacher_device, dtype=getattr(torch, self.teacher_dtype or "", None))
            self._teacher_hash = _hash(teacher)
        elif self.hidden:
            raise ValueError("hidden states need a teacher that is a module; a callable gives logits only")
        self._teacher = teacher
        return True

    def _build_teacher(self, model: nn.Module) -> Callable[..., Any]:
        if not isinstance(self.teacher, str):
            if not callable(self.teacher):
                raise ValueError(f"teacher={self.teacher!r} is neither a module nor callable, 'self' or a path")
            return self.teacher
        if self.teacher == "self":
            changed = [name for name, module in model.named_modules() if hasattr(module, "parametrizations")]
            if changed:
                raise ValueError(
                    f"teacher='self' would copy a model that another modifier has changed already, in {changed[:3]}: "
                    f"let DistillationModifier stand before it in the recipe"
                )
            return copy.deepcopy(model)
        path = Path(self.teacher)
        if not path.exists():
            raise ValueError(f"teacher={self.teacher!r}: no such file or folder; 'self' distils from the model itself")
        if path.is_dir():
            build = getattr(type(model), "from_pretrained", None)
            if build is None:
                kind = type(model).__name__
                raise ValueError(f"teacher={self.teacher!r} is a folder, and {kind} has no from_pretrained")
            loaded: Callable[..., Any] = build(path)
            return loaded
        teacher = copy.deepcopy(model)
        _load_weights(teacher, path)
        return teacher

    # -- while training ------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch the student (and the teacher's hidden states) from now on."""
        assert state.model is not None
        self.hook(state.model, self._remember_call, "forward", with_kwargs=True)
        if self.attention_weight:
            self.hook(state.model, _ask_for_attention, "forward_pre", with_kwargs=True)
        if self.hidden:
            assert isinstance(self._teacher, nn.Module)
            for ours, theirs in self.hidden.items():
                self.hook(_submodule(state.model, ours, "hidden"), _keeper(self._student_hidden, ours), "forward")
                inner = _submodule(self._teacher, theirs, "hidden (teacher)")
                self._teacher_hooks.append(inner.register_forward_hook(_keeper(self._teacher_hidden, ours)))

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.LOSS_CALCULATED:
            self._add_to_loss(state, event)
        elif event.type_ == EventType.OPTIM_POST_STEP and self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._teacher, self._call = None, None
        return True

    def remove_hooks(self, *modules: nn.Module) -> None:
        super().remove_hooks(*modules)
        if not modules:
            for handle in self._teacher_hooks:
                handle.remove()
            self._teacher_hooks = []

    def share_at(self, index: float) -> float:
        """The share a at a point in time."""
        if self.init_weight is None or self.end is None or self.start is None:
            return self.weight
        return value_at(self.schedule, progress(index, self.start, self.end), self.init_weight, self.weight)

    def _add_to_loss(self, state: State, event: Event) -> None:
        assert state.loss is not None
        assert self._teacher is not None
        if self._call is None:
            raise ValueError(
                "distillation saw no forward of the model in this training step; if training_step calls an inner part "
                "of it, name that part with module= in CompressionCallback"
            )
        args, kwargs, student = self._call
        self._call = None
        with torch.no_grad():
            teacher = self._teacher(*_to(args, self._teacher), **_to(_without_labels(kwargs), self._teacher))
        distance = self._distance(student, teacher, kwargs)
        if not torch.isfinite(distance):
            raise ValueError(
                f"the distillation loss is {distance.item()} at step {event.global_step}: expected a finite number; "
                f"look at the teacher's logits, or raise the temperature"
            )
        share = self.share_at(event.current_index)
        with torch.autocast(distance.device.type, enabled=False):
            state.loss.mul_(1 - share).add_(share * distance.to(state.loss) / event.batches_per_step)

    def _distance(self, student: Any, teacher: Any, kwargs: dict[str, Any]) -> Tensor:
        logits = _logits(student)
        mask = _token_mask(kwargs, logits, self.ignore_index)
        total = logits.new_zeros((), dtype=torch.float32)
        if self.divergence is not None:
            theirs = _logits(teacher).to(logits.device)
            if theirs.shape != logits.shape:
                raise ValueError(
                    f"the teacher's logits have shape {tuple(theirs.shape)}, the student's {tuple(logits.shape)}: "
                    f"expected one vocabulary; distil hidden states instead (divergence=None, hidden=...)"
                )
            total = total + masked_mean(logit_divergence(logits, theirs, self.temperature, self.divergence), mask)
        for name in self.hidden:
            ours, theirs = self._student_hidden.pop(name), self._teacher_hidden.pop(name)
            theirs = theirs.to(ours.device)
            per_token = hidden_distance(self._project(name, ours, theirs), theirs, self.hidden_distance)
            fits = mask is not None and mask.shape == per_token.shape
            total = total + self.hidden_weight * masked_mean(per_token, mask if fits else None)
        if self.attention_weight:
            for ours, theirs in zip(_attentions(student), _attentions(teacher), strict=True):
                distance = masked_mean(attention_distance(ours, theirs.to(ours.device)), mask)
                total = total + self.attention_weight * distance
        return total

    def _project(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        """Our hidden state in the teacher's width."""
        if ours.shape[:-1] != theirs.shape[:-1]:
            raise ValueError(
                f"hidden {name!r}: student {tuple(ours.shape)}, teacher {tuple(theirs.shape)}; expected equal shapes "
                f"but for the last dimension"
            )
        if ours.shape[-1] == theirs.shape[-1]:
            return ours
        if name not in self._projections:
            projection = nn.Linear(ours.shape[-1], theirs.shape[-1], bias=False, device=ours.device)
            self._projections[name] = projection
            if self._optimizer is None:
                self._optimizer = torch.optim.AdamW(projection.parameters(), lr=self.projection_lr)
            else:
                self._optimizer.add_param_group({"params": list(projection.parameters())})
            self._restore_projections()
        return self._projections[name](ours.float())

    def _remember_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():              # not module.training: from_pretrained gives a model in eval mode
            self._call = (args, kwargs, output)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "teacher": self._teacher_hash,
            "projections": {name: p.weight.detach() for name, p in self._projections.items()},
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["teacher"] and self._teacher_hash and state["teacher"] != self._teacher_hash:
            raise ValueError(
                f"the checkpoint was trained with the teacher {state['teacher'][:12]}, this run has "
                f"{self._teacher_hash[:12]}: resume with the same teacher"
            )
        self._restored = {"projections": state["projections"], "optimizer": state["optimizer"]}

    def _restore_projections(self) -> None:
        """Put saved projections back, once all of them exist again."""
        saved = self._restored.get("projections", {})
        if saved and self._projections.keys() == saved.keys() and self._optimizer is not None:
            with torch.no_grad():
                for name, weight in saved.items():
                    self._projections[name].weight.copy_(weight)
            self._optimizer.load_state_dict(self._restored["optimizer"])
            self._restored = {}


def _hash(model: nn.Module) -> str:
    """SHA-256 over the name, the shape and the outer values of every tensor: cheap, and changed by any training."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).double().cpu()
        digest.update(name.encode() + str(tuple(tensor.shape)).encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def _load_weights(teacher: nn.Module, path: Path) -> None:
    """Tensors of a file into the teacher; keys of a LightningModule lose their prefix. Nothing is unpickled."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"teacher={str(path)!r} cannot be read without unpickling code, which is refused ({error}); "
                f"save its state_dict, or safetensors"
            ) from error
        weights = weights.get("state_dict", weights)
    ours = teacher.state_dict()
    prefix = next((key[: -len(k)] for key in weights for k in ours if key.endswith(k)), "")
    weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    unfit = [k for k in ours if k not in weights or weights[k].shape != ours[k].shape]
    if unfit:
        raise ValueError(
            f"teacher={str(path)!r} lacks {len(unfit)} tensors of the model or has other shapes: {unfit[:3]}"
        )
    teacher.load_state_dict(weights, strict=False)


def _submodule(model: nn.Module, name: str, field: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        some = next((name for name, _ in model.named_modules() if name), "")
        raise ValueError(f"{field}: there is no module {name!r}; expected a dotted name such as {some!r}") from error


def _keeper(store: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        store[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _ask_for_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_attentions": True}


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if (logits := getattr(output, "logits", None)) is not None:
        return logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(f"found no logits in an output of type {type(output).__name__}; expected a tensor or .logits")


def _attentions(output: Any) -> tuple[Tensor, ...]:
    maps = getattr(output, "attentions", None)
    if not maps or maps[0] is None:
        raise ValueError("attention_weight > 0, but the model gives no attention maps; use attn_implementation='eager'")
    return tuple(maps)


def _token_mask(kwargs: Mapping[str, Any], logits: Tensor, ignore_index: int) -> Tensor | None:
    """True for tokens that count, in the leading shape of the logits; None when all do."""
    mask = None
    attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if isinstance(attention, Tensor) and attention.shape == logits.shape[:-1]:
        mask = attention.bool()
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        counts = labels != ignore_index
        mask = counts if mask is None else mask & counts
    return mask


def _without_labels(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "labels"}


def _to(value: Any, teacher: Any) -> Any:
    """Inputs on the teacher's device."""
    parameter = next(teacher.parameters(), None) if isinstance(teacher, nn.Module) else None
    if parameter is None:
        return value
    if isinstance(value, Tensor):
        return value.to(parameter.device)
    if isinstance(value, dict):
        return {key: _to(v, teacher) for key, v in value.items()}
    return tuple(_to(v, teacher) for v in value) if isinstance(value, tuple) else value
