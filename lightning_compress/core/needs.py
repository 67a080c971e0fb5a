"""What a modifier needs from a run: one frozen object, which its class declares and everybody asks for.

A class whose needs depend on its arguments overrides :attr:`Modifier.needs` with a property that returns one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["OLD_NAMES", "Needs", "refuse_old_names"]

# Attributes of earlier versions, and the field of Needs that replaced each.
OLD_NAMES = {
    "needs_calibration": "calibration",
    "needs_data": "data",
    "one_pass": "one_pass",
    "own_pass": "own_pass",
    "surveys": "survey",
    "needs_replay": "replay",
    "compares": "dense_outputs",
    "hands_over": "hand_over",
    "best_needs_state": "checkpoint_state",
    "reshapes": "changes_shapes",
    "keeps_shapes": "fixed_shapes_from",
    "parametrizes": "parametrizes",
    "acts_in_window": "window",
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Needs of one modifier; the default of every field suits a modifier that acts in training only.

    Args:
        calibration: Calibration events (CALIBRATION_START, BLOCK_END, ...). Implied by ``data``, ``survey``,
            ``replay``, ``after_walk``, ``dense_outputs``, ``dense_inputs`` and ``hand_over``.
        data: Calibration batches; without any it cannot work.
        one_pass: It can finish each hooked module alone, at MODULE_READY, so that the walk may take one pass.
        own_pass: A pass over the inputs of each block for itself: later modifiers must see the block as it leaves it.
        survey: All calibration batches through the dense model before the walk (BLOCK_SURVEYED; one more forward pass).
        gradients: With ``survey``: a backward pass for each batch, too, of a loss whose labels are drawn from the dense
            model itself. ``classes``: cross entropy, labels drawn from the softmax of its logits; ``values``: squared
            error of its output, with normal noise as error. ``training_step``: of the user's own loss
            (``State.user_loss``). Outputs of hooked modules then have gradients.
        replay: Whole blocks run again at BLOCK_END (``State.replay``), so that the walk must take two passes.
        after_walk: It acts at CALIBRATION_END, when all blocks are compressed: ``State.replay`` then runs the whole
            model on a batch, with gradients where they are enabled. The model must be in memory.
        dense_outputs: The output of each block in the dense model (``State.dense``; one more forward pass).
        dense_inputs: Its hooks see each block of the dense model at work, too, before the block is calibrated
            (:attr:`Hooks.dense_pass`; the same forward pass).
        hand_over: Calibration at ``start``, before the batch; a later modifier then trains on from the result. All that
            it claims must be claimed again by a modifier after it that :meth:`Modifier.takes_over`.
        checkpoint_state: Its :meth:`Modifier.state_dict` of the moment when weights were saved: weights of an earlier
            checkpoint are of no use without it.
        changes_shapes: Permission to change the shapes of parameters.
        fixed_shapes_from: When it begins to keep tensors shaped as the weights that it :meth:`Modifier.touches`.
        parametrizes: Weights that are computed from others from set-up on, so that the model is not a plain copy.
        sharded: It works on parameters that FSDP2 or tensor parallelism shards (layers/sharded.py). False, or the
            reason as a text: models with such parameters are refused at set-up.
        team: How it works where several processes calibrate together, each with its own batches. ``sums``: it combines
            its statistics over all ranks (``state.team``) before it uses them. ``weights``: it uses no data, and does
            the same on every rank. ``alone``: it must see all batches, so that rank 0 calibrates for all.
        window: Whether ``start``, ``end`` and ``update`` have a meaning. None: they have if the class has a handler for
            them, or acts in training only.
    """

    calibration: bool = False
    data: bool = False
    one_pass: bool = False
    own_pass: bool = False
    survey: bool = False
    gradients: Literal["classes", "values", "training_step"] | None = None
    replay: bool = False
    after_walk: bool = False
    dense_outputs: bool = False
    dense_inputs: bool = False
    hand_over: bool = False
    checkpoint_state: bool = False
    changes_shapes: bool = False
    fixed_shapes_from: Literal["never", "start", "set-up"] = "never"
    parametrizes: bool = False
    sharded: bool | str = False
    team: Literal["sums", "weights", "alone"] = "alone"
    window: bool | None = None

    def __post_init__(self) -> None:
        dense = self.dense_outputs or self.dense_inputs
        if self.data or self.survey or self.replay or self.after_walk or dense or self.hand_over:
            object.__setattr__(self, "calibration", True)


def refuse_old_names(class_name: str, attributes: Iterable[str]) -> None:
    """ValueError names the attributes of earlier versions that a class declares, and what to write instead."""
    fields = {name: OLD_NAMES[name] for name in attributes if name in OLD_NAMES}
    if fields:
        arguments = ", ".join(f"{field}=..." for field in dict.fromkeys(fields.values()))
        raise ValueError(
            f"{class_name} declares {', '.join(fields)}, which nothing reads any more; "
            f"write needs = Needs({arguments}) in the class, from lightning_compress.core import Needs"
        )
