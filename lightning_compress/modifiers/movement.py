r"""Movement pruning: weights that move towards zero while the model trains are pruned, whatever their size.

    S_rc <- S_rc - (dL/dW'_rc) W_rc        eq. (8), W' = W M(S) is what the model computes with
    hard     M keeps the highest scores; the schedule gives their number
    soft     M = sigmoid(S) > tau;  S_rc <- S_rc - a ( u_rc + l sigmoid'(S_rc) ),  u = (dL/dW') W / its rms

Sanh, Wolf & Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv:2005.07683. The gradient is that of
the masked weight also where the mask is 0 (straight through), so a weight that was pruned may come back. In blocks:
Lagunas et al. 2021, arXiv:2109.04838.

The rms is that of one matrix over all steps so far; it makes a, l and tau independent of the size of the loss. The
authors' code has Adam do that, weight by weight.

Masked weights are zero in the model itself, so the gradient of a Linear is that of W'. Their values before the mask
("sleeping weights") are stored here and come back when the mask releases them. Checkpoints have dense keys; scores,
masks and sleeping weights are in the state of the callback.

Shapes: R rows, C columns.
"""

import warnings
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.pruning.scheduled import ScheduledSparsity

__all__ = ["MovementPruningModifier", "movement", "soft_step"]

HARD_ONLY = {"init_sparsity", "final_sparsity", "layer_sparsity", "scope", "mask_structure"}
SOFT_ONLY = {"threshold", "regularization", "score_lr"}


def movement(G_RC: Tensor, W_RC: Tensor) -> Tensor:
    """(dL/dW') W, float32 [R, C]: positive where a step of gradient descent takes the weight towards zero."""
    return G_RC.float() * W_RC.float()


def soft_step(S_RC: Tensor, u_RC: Tensor, score_lr: float, regularization: float) -> Tensor:
    """The scores after one step of the soft variant; the regularizer is the sum of sigmoid(S)."""
    share_RC = S_RC.sigmoid()
    return S_RC - score_lr * (u_RC + regularization * share_RC * (1 - share_RC))


class MovementPruningModifier(ScheduledSparsity):
    """Prune by movement between ``start`` and ``end``, while the model is fine-tuned; then hold the masks.

    Scores add up from ``start``; masks are chosen anew at every ``update`` (by default at every step). While all scores
    are zero, weights are ranked by magnitude. A sleeping weight does not train and does not decay.

    Args:
        mode: ``hard``: the schedule gives the number of pruned weights. ``soft``: a threshold on the scores does, with
            ``threshold``, ``regularization`` and ``score_lr``, and without a sparsity.
        threshold: tau at ``end``, in (0, 1), for ``soft``; it rises along the schedule from 0.
        regularization: l at ``end``, for ``soft``; it rises along the schedule from 0. A larger value prunes more.
        score_lr: Learning rate a of the scores, for ``soft``.

    Raises:
        ValueError: The window is missing, an argument belongs to the other mode, or a value is not possible.
    """

    needs: ClassVar[Needs] = Needs(checkpoint_state=True, fixed_shapes_from="start")
    technique: ClassVar[str] = "movement"

    start: float | None = 0.0
    mode: Literal["hard", "soft"] = "hard"
    threshold: float = Field(default=0.1, gt=0, lt=1)
    regularization: float = Field(default=1.0, ge=0)
    score_lr: float = Field(default=0.01, gt=0)

    _scores: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # float32 [R, C]
    _asleep: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # [R, C], zero where the weight is awake
    _pending: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # movement of a step that may be skipped
    _squares: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # sum of mean squares, steps: float64 [2]
    _moved: bool = PrivateAttr(default=True)  # scores are newer than the masks
    _done: bool = PrivateAttr(default=False)  # the masks are the final ones
    _final: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # masks before the best weights came back

    @model_validator(mode="after")
    def _mode_fits(self) -> "MovementPruningModifier":
        if self.start is None or self.end is None:
            raise ValueError(
                f"start={self.start}, end={self.end}: movement pruning needs a window of training; after training "
                "there is no movement to measure (MagnitudePruningModifier prunes then)"
            )
        other = HARD_ONLY if self.mode == "soft" else SOFT_ONLY
        if names := self.changed(other):
            decides = "threshold and regularization decide" if self.mode == "soft" else "the schedule decides"
            raise ValueError(f"{', '.join(names)} would do nothing with mode={self.mode!r}: {decides}; leave it out")
        return self

    # -- scores --------------------------------------------------------------------------------------------------------

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            self._final = {}  # training goes on, after a test loop in between
        elif event.type_ == EventType.OPTIM_PRE_STEP:
            stepped = _stepped(state.optimizer)
            self._pending = self._movement(stepped) if self._started and not self._done else {}
            self._weights.apply_to_gradients(stepped)
        elif event.type_ == EventType.OPTIM_POST_STEP:  # the step was not skipped: its movement counts
            for name, moved_RC in self._pending.items():
                self._add(name, moved_RC, self.sparsity_at(event.current_index))
            self._pending, self._moved = {}, True
            self._weights.apply_to_weights()

    def _movement(self, stepped: Collection[int] | None) -> dict[str, Tensor]:
        dense = self._dense()
        return {name: movement(G_RC, dense[name]) for name, G_RC in self._weights.gradients(stepped).items()}

    def _add(self, name: str, moved_RC: Tensor, curve: float) -> None:
        S_RC = self._scores.get(name, torch.zeros_like(moved_RC)).to(moved_RC.device)
        if self.mode == "hard":
            self._scores[name] = S_RC - moved_RC
            return
        squares = self._squares.get(name, torch.zeros(2, dtype=torch.float64, device="cpu")).to(moved_RC.device)
        self._squares[name] = squares = squares + torch.stack([moved_RC.square().mean().double(), squares.new_ones(())])
        u_RC = moved_RC / (squares[0] / squares[1]).sqrt().clamp_min(1e-30).float()
        self._scores[name] = soft_step(S_RC, u_RC, self.score_lr, self.regularization * curve)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.resumed:
            self._choose(self.sparsity_at(event.current_index))

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START and self._moved and not self._done:
            self._choose(self.sparsity_at(event.current_index))

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._done:
            return  # resumed past the end
        if names := [name for name in self._weights.modules if name not in self._scores]:
            instead = "they were pruned by magnitude" if self.mode == "hard" else "they were not pruned"
            warnings.warn(
                f"{self.name}: no gradient reached {', '.join(names[:5])} inside the window (frozen, or never called), "
                f"so that there was no movement to rank by: {instead}; unfreeze them, or add them to ignore",
                stacklevel=2,
            )
        self._choose(1.0)
        self._done = True
        self._scores, self._asleep, self._squares = {}, {}, {}  # pruned weights stay pruned from now on
        if names := [name for name, zeros in self._weights.sparsity().items() if zeros == 1.0]:
            warnings.warn(
                f"{self.name}: all weights of {', '.join(names[:5])} are zero; give less regularization, a lower "
                f"threshold or sparsity, or add it to ignore",
                stacklevel=2,
            )

    def _choose(self, curve: float) -> None:
        dense = self._dense()
        if self.mode == "hard":
            masks = dict(self.masks_at(curve, self._ranking(dense)))
        else:
            tau = self.threshold * curve
            masks = {name: S_RC.sigmoid() > tau for name, S_RC in self._scores.items()}
        self._set_masks(masks, dense)
        self._moved = False

    def _ranking(self, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scores. Without scores: magnitudes, or zeros in a global ranking, where magnitudes cannot be compared."""
        default = {name: 0 * W if self._scores and self.scope == "global" else W.abs() for name, W in dense.items()}
        return {n: self._scores[n].to(W.device) if n in self._scores else default[n] for n, W in dense.items()}

    def _set_masks(self, masks: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
        """Apply masks: weights that they prune are stored, other weights get their stored values back."""
        for name, mask in masks.items():
            self._asleep[name] = dense[name].masked_fill(mask.to(dense[name].device), 0)
            self._weights.write(name, dense[name])
        self._weights.set(masks)

    def _dense(self) -> dict[str, Tensor]:
        """Copies of all target weights as they are without masks, [R, C] each."""
        matrices = self._weights.matrices()
        return {n: W + self._asleep[n].to(W.device) if n in self._asleep else W.clone() for n, W in matrices.items()}

    # -- the end -------------------------------------------------------------------------------------------------------

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The best weights are back; restore what was saved with them."""
        if self._count(state["masks"]) > self._count(self._weights.masks):
            self._final = dict(self._weights.masks)
        was_done = self._done
        self._restore(state)
        self._done = was_done or self._done  # the clock does not go back

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._final:
            before = self._weights.mean_sparsity()
            self._set_masks(self._final, self._dense())
            warnings.warn(
                f"{self.name}: the best checkpoint was saved at a sparsity of {before:.3f}, before the schedule had "
                f"reached {self._weights.mean_sparsity():.3f}: it gets the masks of the last step now, without "
                f"training after it; set load_best=False, or let the window end earlier",
                stacklevel=2,
            )
        self._weights.apply_to_weights()
        if not (self._done or self._final):
            self.warn_of_an_early_end()
        self._final, self._asleep = {}, {}

    def _count(self, masks: dict[str, Tensor]) -> int:
        """Number of weights that survive these masks; without a mask all do."""
        matrices = self._weights.matrices()
        return sum(int(masks[name].sum()) if name in masks else W.numel() for name, W in matrices.items())

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        tensors = {"scores": self._scores, "asleep": self._asleep, "squares": self._squares}
        copies = {key: dict(value) for key, value in tensors.items()}
        return {**super().state_dict(), **copies, "done": self._done}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._scores, self._asleep, self._squares = (dict(state[key]) for key in ("scores", "asleep", "squares"))
        self._done, self._moved = state["done"], True


def _stepped(optimizer: Any) -> set[int] | None:
    """Identities of the parameters that this optimizer steps; None: unknown, so all."""
    groups = getattr(optimizer, "param_groups", None)
    return None if groups is None else {id(p) for group in groups for p in group["params"]}
