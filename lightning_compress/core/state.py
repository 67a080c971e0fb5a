"""State: what a handler sees at an event. Frozen data that the caller builds; never global."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.ledger import Ledger
from lightning_compress.team import Team

__all__ = ["State", "TrainingState"]

TrainingState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, on the CPU, and facts in JSON types."""


def _go_on() -> None:
    """The run is not interrupted."""


def _restore_nothing(title: str) -> TrainingState | None:
    return None


def _store_nothing(title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The run begins anew after a kill."""


@dataclass(frozen=True)
class State:
    """Model, batch and calibration data at one event.

    Args:
        model: The model that is compressed (not the LightningModule around it).
        teacher_model: A frozen model to learn from, if there is one.
        optimizer: The optimizer, or the list of them, once they exist.
        loss: At LOSS_CALCULATED the scalar loss, already divided by the accumulated batches. It cannot be replaced;
            ``loss.add_(x)`` reaches backward.
        batch_data: The batch of this step, as the loader gave it.
        block: At BLOCK_SURVEYED, BLOCK_END and MODULE_READY the block that is calibrated; None for modules outside of
            all blocks.
        block_name: Its dotted name inside ``model``; empty outside of all blocks.
        modules: At BLOCK_SURVEYED and BLOCK_END every module of the block, at MODULE_READY those with complete
            inputs, by their dotted name inside ``model``.
        replay: At BLOCK_END, for a modifier that must see the block at work again: ``replay(i)`` runs the block
            on calibration batch ``i`` and returns its output (None where the run ends before that), with hooks paused
            and that batch's ``token_mask``. None: no data, or the inputs are no longer stored. At CALIBRATION_END,
            for a modifier with ``needs.after_walk``: the same of the whole model.
        dense: At BLOCK_END, for a modifier that asks for it (``needs.dense_outputs``): ``dense(i)`` is the hidden
            state that the block gave for batch ``i`` before anything was done to it, its input coming from dense blocks
            too, on the device where inputs are kept. None: no modifier asks, these modules are not a block, or the
            hidden state is not the first tensor that it returns.
        batches: How many batches ``replay`` knows.
        interrupt: At CALIBRATION_END, for a modifier with ``needs.after_walk``: to be called by all processes together,
            as often as their work allows; what it raises ends the run there.
        user_loss: ``user_loss(batch, number)``: the user's own loss on a calibration batch, a tensor with one number,
            or None where it has none for this batch: that of the LightningModule's ``training_step``, or of ``loss``
            of ``compress``. None: there is neither.
        store: There, too: ``store(title, tensors, facts)`` keeps how far the modifier is, facts in JSON types, in place
            of what it kept before. All processes call it together, with equal values.
        restore: ``restore(title)`` gives to all processes what was kept last under this title, also by a run that was
            killed. None: nothing was.
        ledger: Ledger of the facts on modules.
        team: The processes that calibrate together, each with its own batches.
    """

    model: nn.Module = None  # type: ignore[assignment]  # handlers always get one
    teacher_model: nn.Module | None = None
    optimizer: Any = None
    loss: Tensor | None = None
    batch_data: Any = None
    block: nn.Module | None = None
    block_name: str = ""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    replay: Callable[[int], Any] | None = None
    dense: Callable[[int], Tensor] | None = None
    batches: int = 0
    interrupt: Callable[[], None] = _go_on
    user_loss: Callable[[Any, int], Tensor | None] | None = None
    store: Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], None] = _store_nothing
    restore: Callable[[str], TrainingState | None] = _restore_nothing
    ledger: Ledger = field(default_factory=Ledger)
    team: Team = field(default_factory=Team)

    def but(self, **changes: Any) -> "State":
        """The same state with some fields changed."""
        return replace(self, **changes)
