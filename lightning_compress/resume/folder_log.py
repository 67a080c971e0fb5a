"""The log of a calibration in a folder: a shard for each finished group of modules, and the plan that they belong to.

    <folder>/holder.json                        who writes (holder.py)
    <folder>/.groups.partial/                   shards, numbered in the order of the walk (export/stream.py)
    <folder>/.groups.partial/log/00002.json     of each: checksum, rows of the ledger, facts
    <folder>/.groups.partial/log/plan.json      recipe, model, data (plan.py)
    <folder>/.training.partial/                 states of a modifier that trains after the walk (training_log.py)

    facts: {"title": name of the group, "state": facts of quant/module_state.py, "unchanged": [names of tensors that are
            as in the plan, and not in the shard], "modifiers": [Modifier.group_state], "random": torch's random state,
            "checksum": sha256 of all these and of the rows}

Rank 0 alone reads and writes; the other ranks get what it has read.
"""

import base64
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.calibration.group_log import GroupLog, NoLog
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Lifecycle, Modifier, State
from lightning_compress.core.ledger import Row
from lightning_compress.core.state import TrainingState
from lightning_compress.export.stream import Shard, ShardWriter
from lightning_compress.layers.sharded import is_sharded
from lightning_compress.quant.module_state import dense_tensors, from_tensors, settle, to_tensors
from lightning_compress.resume.holder import Holder
from lightning_compress.resume.plan import (
    batch_digests,
    difference,
    json_digest,
    make_plan,
    model_digests,
    read_plan,
    tensor_digest,
    write_plan,
)
from lightning_compress.resume.training_log import TrainingLog, remove_training
from lightning_compress.team import Team

__all__ = [
    "ANEW",
    "FolderLog",
    "Resume",
    "check_resume",
    "opened",
    "random_state",
    "remove",
    "set_random_state",
    "unable",
]

Resume = Literal["auto", "never", "must"]
SURVEY = "the survey of the dense model"
ANEW = "resume='never' begins anew"

logger = logging.getLogger(__name__)


def check_resume(resume: Any) -> None:
    """ValueError for anything but ``auto``, ``never`` and ``must``."""
    if resume not in get_args(Resume):
        raise ValueError(f"resume={resume!r}: expected {', '.join(map(repr, get_args(Resume)))}")


def unable(modifiers: Sequence[Modifier]) -> list[str]:
    """Names of modifiers whose calibration cannot go on after a kill."""
    return [modifier.name for modifier in modifiers if modifier.group_state({}) is None]


@contextmanager
def opened(
    folder: str | Path | None,
    resume: Resume,
    *,
    replaces: bool = False,
    interrupt: Callable[[], None] = NoLog.interrupt,
    team: Team | None = None,
) -> Iterator[GroupLog]:
    """A :class:`FolderLog`, whose lock is dropped at the end; without a folder one that writes nothing."""
    check_resume(resume)
    if folder is None:
        if resume == "must":
            raise ValueError("resume='must' needs a log that the calibration goes on from, and there is none: log=...")
        yield NoLog(interrupt)
        return
    log = FolderLog(folder, resume, replaces=replaces, interrupt=interrupt, team=team)
    try:
        yield log
    finally:
        log.close()


def remove(folder: Path) -> None:
    """Remove a log whose results are elsewhere by now."""
    shutil.rmtree(folder / ".groups.partial", ignore_errors=True)
    remove_training(folder)
    with suppress(OSError):
        (folder / "holder.json").unlink(missing_ok=True)
        folder.rmdir()


class FolderLog:
    """A :class:`~lightning_compress.calibration.group_log.GroupLog` in a folder.

    Args:
        folder: Folder of the log.
        resume: ``auto``: go on where the log ends. ``must``: the same, and there must be one. ``never``: begin anew.
        replaces: With ``auto``, begin anew with a warning where recipe, model or data differ, in place of an error.
        interrupt: As in the protocol.
        team: The ranks of the log, where it is not those that share the calibration: ranks that hold shards of a model
            may each calibrate with all batches.
    """

    def __init__(
        self,
        folder: str | Path,
        resume: Resume = "auto",
        *,
        replaces: bool = False,
        interrupt: Callable[[], None] = NoLog.interrupt,
        team: Team | None = None,
    ):
        self.folder, self.interrupt = Path(folder).expanduser().resolve(), interrupt
        self.resume, self.replaces, self._given_team = resume, replaces, team
        self._holder: Holder | None = None
        self._shards: Sequence[Shard] = ()
        self._digests: Mapping[str, str] = {}
        self._number, self._rows = 0, list[Row]()
        self._training: TrainingLog | None = None

    def begin(
        self,
        lifecycle: Lifecycle,
        state: State,
        batches: Sequence[Any],
        blocks: Mapping[str, nn.Module],
        options: CalibrationOptions,
    ) -> None:
        if names := unable(lifecycle.modifiers):
            raise ValueError(
                f"{', '.join(names)} cannot go on after a kill, as the class has no group_state: calibrate without a "
                f"log, or add it (docs/writing.md)"
            )
        self._lifecycle, self._state, self._number = lifecycle, state, 0
        self._team = team = self._given_team or state.team
        data = batch_digests(batches, state.team, team)
        digests = model_digests(state.model, hashed=team.rank == 0) if team.rank == 0 or is_sharded(state.model) else {}

        def open_log() -> None:
            plan = make_plan(lifecycle.modifiers, state.model, digests, data, list(blocks), options)
            self._open(plan, count=2 * len(blocks) + 3)  # blocks, the modules between them, the survey

        team.result(open_log, "opening the log of the calibration")

    def restore(self, title: str, modules: Mapping[str, nn.Module]) -> bool:
        self._number += 1
        entry = self._team.result(lambda: self._read(title), "reading the log")
        if entry is None:
            self._rows = self._state.ledger.rows
            return False
        tensors, facts, rows = entry
        if facts["unchanged"]:
            present = dense_tensors(modules)
            tensors |= {name: present[name] for name in facts["unchanged"]}
        try:
            from_tensors(modules, tensors, facts["state"])
            for modifier, known in zip(self._lifecycle.modifiers, facts["modifiers"], strict=True):
                modifier.load_group_state(modules, known)
            self._state.ledger.put(rows)
            set_random_state(facts["random"])
        except Exception as error:  # the modules are changed in part by now
            raise ValueError(
                f"shard {self._number} of the log in {self.folder} does not fit: {error}; {ANEW}"
            ) from error
        return True

    def store(self, title: str, modules: Mapping[str, nn.Module]) -> None:
        tensors, facts = to_tensors(modules)
        settle(modules, tensors, facts)
        earlier = set(map(id, self._rows))
        rows = [asdict(row) for row in self._state.ledger.rows if id(row) not in earlier]
        modifiers = [modifier.group_state(modules) for modifier in self._lifecycle.modifiers]

        def write() -> None:
            unchanged = [n for n, t in tensors.items() if n in self._digests and self._digests[n] == tensor_digest(t)]
            changed = {name: tensor for name, tensor in tensors.items() if name not in set(unchanged)}
            self._write(changed, rows, title=title, state=facts, unchanged=unchanged, modifiers=modifiers)

        self._team.result(write, "writing the log")

    def restore_survey(self) -> Sequence[Modifier]:
        if not (surveys := self._surveys):
            return ()
        self._number += 1
        entry = self._team.result(lambda: self._read(SURVEY), "reading the log")
        if entry is None:
            return ()
        tensors, facts, _ = entry
        for key, modifier in surveys.items():
            prefix = f"survey.{key}."
            modifier.load_survey_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        if len(surveys) == sum(modifier.needs.survey for modifier in self._lifecycle.modifiers):
            set_random_state(facts["random"])  # else the others survey from the state that they surveyed from before
        return list(surveys.values())

    def store_survey(self) -> None:
        if states := {key: modifier.survey_state() or {} for key, modifier in self._surveys.items()}:
            tensors = {f"survey.{key}.{name}": t.cpu() for key, state in states.items() for name, t in state.items()}
            sums: dict[str, Tensor] = {}
            for each in self._state.team.gather(tensors):  # equal bits for any number of ranks: they are float64
                sums |= {name: sums[name] + tensor if name in sums else tensor for name, tensor in each.items()}

            def write() -> None:
                self._write(sums, [], title=SURVEY, state={}, unchanged=[], modifiers=[])

            self._team.result(write, "writing the log")

    def restore_training(self, title: str) -> TrainingState | None:
        def read() -> tuple[TrainingState, Any] | None:
            self._training = TrainingLog(self.folder)
            return self._training.read(title)

        entry = self._team.result(read, "reading the log")
        if entry is None:
            return None
        state, random = entry
        set_random_state(random)
        return state

    def store_training(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        def write() -> None:
            self._training = self._training or TrainingLog(self.folder)
            self._training.write(title, tensors, facts, random_state())

        self._team.result(write, "writing the log")

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._holder is not None:
            self._holder.release()
        self._holder = None

    @property
    def _surveys(self) -> dict[str, Modifier]:
        """The modifiers whose survey the log keeps."""
        pairs = zip(self._lifecycle.keys(), self._lifecycle.modifiers, strict=True)
        return {key: m for key, m in pairs if m.needs.survey and m.survey_state() is not None}

    # -- on rank 0 ----------------------------------------------------------------------------------------------------

    def _open(self, plan: dict[str, Any], count: int) -> None:
        self._holder, self._digests, self._shards = Holder(self.folder), plan["model"], ()
        self._writer = ShardWriter(self.folder / "groups", count)
        path = self._writer.log / "plan.json"
        if self.resume != "never" and path.exists():
            try:
                changes = difference(read_plan(path), plan)
            except ValueError as error:
                raise ValueError(f"the log in {self.folder} cannot be read: {error}; {ANEW}") from error
            if not changes:
                self._shards = self._writer.finished()
                logger.info("going on in %s after %d finished groups", self.folder, len(self._shards))
                return
            if not (self.replaces and self.resume == "auto"):
                raise ValueError(f"the log in {self.folder} belongs to another calibration: {changes}; {ANEW}")
            warnings.warn(f"the log in {self.folder} is not used, as it differs in {changes}", stacklevel=2)
        elif self.resume == "must":
            raise ValueError(f"resume='must', and {self.folder} holds no log of a calibration; check the folder")
        self._writer.discard()
        remove_training(self.folder)
        write_plan(path, plan)

    def _read(self, title: str) -> tuple[dict[str, Tensor], Mapping[str, Any], Sequence[Mapping[str, Any]]] | None:
        if self._number > len(self._shards):
            return None
        shard = self._shards[self._number - 1]
        facts = dict(shard.facts)
        if facts.pop("checksum", None) != json_digest([facts, shard.rows]) or facts.get("title") != title:
            warnings.warn(
                f"shard {shard.number} of {self.folder} is damaged, or not that of {title}: it and those after it are "
                f"done again",
                stacklevel=2,
            )
            self._shards = self._shards[: self._number - 1]
            return None
        return self._writer.read(shard), facts, shard.rows

    def _write(self, tensors: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        facts["random"] = random_state()
        self._writer.write(self._number, tensors, facts | {"checksum": json_digest([facts, rows])}, rows)


def random_state() -> dict[str, Any]:
    """Torch's random state in JSON types."""
    states = {"cpu": [torch.get_rng_state()]}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return {kind: [base64.b64encode(s.numpy().tobytes()).decode() for s in each] for kind, each in states.items()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """The reverse of :func:`random_state`."""
    cpu, *_ = (_decoded(text) for text in state["cpu"])
    torch.set_rng_state(cpu)
    if "cuda" in state and torch.cuda.is_initialized() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decoded(text) for text in state["cuda"]])


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
