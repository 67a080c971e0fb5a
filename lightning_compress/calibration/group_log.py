"""What the walk tells a log of finished groups of modules, and asks it when a run continues.

    begin                before CALIBRATION_START; it may raise: another recipe, model or data than the log's
    restore, store       of each group, in the order of the walk; of the survey likewise; of training after the walk
    interrupt            after each MODULE_READY and each finished group; what it raises ends the calibration there

At each of these points nothing is half done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Lifecycle, Modifier, State
from lightning_compress.core.state import TrainingState

__all__ = ["GroupLog", "NoLog"]


class GroupLog(Protocol):
    """A log of one calibration; every rank calls all of it, in the same order."""

    @property
    def interrupt(self) -> Callable[[], None]:
        """Called where the calibration may end."""

    def begin(
        self,
        lifecycle: Lifecycle,
        state: State,
        batches: Sequence[Any],
        blocks: Mapping[str, nn.Module],
        options: CalibrationOptions,
    ) -> None:
        """The modifiers are initialized, and the model is about to be calibrated."""

    def restore(self, title: str, modules: Mapping[str, nn.Module]) -> bool:
        """Finish a group as an earlier run did: modules, rows of the ledger, what modifiers know of it, random state.

        Returns:
            False where the log does not hold the group; nothing is changed then.
        """

    def store(self, title: str, modules: Mapping[str, nn.Module]) -> None:
        """The group is finished; when this returns, it outlives a kill."""

    def restore_survey(self) -> Sequence[Modifier]:
        """Give modifiers what they have seen in the survey of an earlier run; the others must survey again.

        Returns:
            The modifiers that have it.
        """

    def store_survey(self) -> None:
        """All batches have run through the dense model."""

    def restore_training(self, title: str) -> TrainingState | None:
        """What :meth:`store_training` got last under this title, in this run or an earlier one."""

    def store_training(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """How far a modifier is that trains after the walk; what it stored before may be dropped."""


def _go_on() -> None:
    """The calibration is not interrupted."""


@dataclass(frozen=True)
class NoLog:
    """The log of a calibration that begins anew after a kill."""

    interrupt: Callable[[], None] = _go_on

    def begin(
        self,
        lifecycle: Lifecycle,
        state: State,
        batches: Sequence[Any],
        blocks: Mapping[str, nn.Module],
        options: CalibrationOptions,
    ) -> None:
        """Nothing is written."""

    def restore(self, title: str, modules: Mapping[str, nn.Module]) -> bool:
        return False

    def store(self, title: str, modules: Mapping[str, nn.Module]) -> None:
        """Nothing is written."""

    def restore_survey(self) -> Sequence[Modifier]:
        return ()

    def store_survey(self) -> None:
        """Nothing is written."""

    def restore_training(self, title: str) -> TrainingState | None:
        return None

    def store_training(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Nothing is written."""
