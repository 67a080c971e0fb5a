"""What one run carries from set-up to its end: its options, where it writes, and facts for the report."""

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning.pytorch import Trainer

from lightning_compress.team import Team
from lightning_compress.training.evaluation import Measurement
from lightning_compress.training.hub import check_token
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.outputs import FolderLock, Outputs
from lightning_compress.training.preemption import Preemption
from lightning_compress.training.samples import OwnBatches
from lightning_compress.training.saved_files import SavedFiles

__all__ = ["Run"]

# facts that a resumed run cannot measure again, so that checkpoints carry them
CARRIED_FACTS = ("model_bytes_before", "metric_dense", "batches_repeated_on_resume", "beside_weights", "gate")


@dataclass
class Run:
    """One run.

    Args:
        options: The callback's arguments.
        recipe: The modifiers as primitives, for checkpoints, export and report.
        name: Random name; checkpoints carry it on to the run that resumes from them.
        outputs: Paths that this fit writes; None in a fast_dev_run.
        saved_files: Checkpoint files that this process saved.
        own_batches: Batches of the user's ``calibration_dataloader``, of which the first is looked at early.
        team: The processes of this fit, validation or test.
        preemption: What answers signals meanwhile.
        seconds: Seconds of each phase.
        facts: Facts for the report.
        calibration: Batches for further rounds (training/promotion.py), and a sentence on them.
        dense: What was measured before a window opened, in this process.
        loader_states: Where the training loaders of each rank stood in the checkpoint that was loaded.
    """

    options: CallbackOptions
    recipe: dict[str, Any]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    outputs: Outputs | None = None
    saved_files: SavedFiles = field(default_factory=SavedFiles)
    own_batches: OwnBatches = field(default_factory=OwnBatches)
    team: Team = field(default_factory=Team)
    preemption: Preemption = field(default_factory=Preemption)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    dense: Measurement | None = None
    calibration: tuple[list[Any], str] | None = None
    loader_states: list[dict[str, Any]] = field(default_factory=list)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Become the run that a checkpoint is of; ``state`` is that of the callback in it."""
        self.name = state.get("run", self.name)
        self.facts |= state.get("facts", {})
        self.loader_states = state.get("loaders", [])

    @contextmanager
    def in_team(self, trainer: Trainer) -> Iterator[None]:
        """Inside, :attr:`team` is that of all processes, who answer signals together; all enter at the same time."""
        self.team = Team.of_processes()
        self.preemption = Preemption(trainer, self.team)
        try:
            with self.team.one_voice(), self.preemption.watching():
                yield
        finally:
            self.team.close()
            self.team, self.preemption = Team(), Preemption()

    def claim_outputs(self, trainer: Trainer, lock: FolderLock, *, resumed: bool) -> None:
        """Check that this run can write its outputs, and keep others away; every rank gets the name of rank zero."""
        outputs = self.outputs = Outputs.of(trainer, self.options.export_dir, self.options.formats)
        if (hub := self.options.target) is not None:
            self.team.result(partial(check_token, hub), "checking hub")
        claim = partial(outputs.claim, lock, resumed=resumed, run=self.name)
        self.name = self.team.result(claim, "checking export_dir")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the seconds of a phase."""
        start = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def add_repeated_batches(self, batches: int) -> None:
        """A resumed epoch has trained on so many batches a second time."""
        if batches:
            self.facts["batches_repeated_on_resume"] = self.facts.get("batches_repeated_on_resume", 0) + batches

    @property
    def carried_facts(self) -> dict[str, Any]:
        """Facts that go into checkpoints."""
        return {name: self.facts[name] for name in CARRIED_FACTS if name in self.facts}
