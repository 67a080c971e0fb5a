"""The log of a calibration from folder to folder is the export: each shard of it is a finished block.

    .<target>.lock/holder.json                  who writes (holder.py)
    .<target>.partial/                          shards, one for each block, and one for the modules outside of them
    .<target>.partial/log/00002.json            of each: checksum, rows of the ledger, facts
    .<target>.partial/log/plan.json             recipe, model, data (plan.py); the model by its files

    facts: {"dense": {module: record as JSON, where its weight is dense on disk}, "state": facts of
            quant/module_state.py, or null where the block cannot be restored from its shard, "modifiers":
            [Modifier.group_state], "random": torch's random state}

The modules outside of blocks are compressed again after a kill.

Several processes (``team``): on calibration data all compress every block together, and rank 0 writes. Without data
they share the blocks: rank r compresses and writes blocks r, r + size, ..., rank 0 also the modules outside of blocks.
At the end all get the rows of the ledger, and the records without values.
"""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calibration.blocks import modules_of_block, modules_outside
from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Lifecycle, Modifier, State
from lightning_compress.core.ledger import Row
from lightning_compress.core.state import TrainingState
from lightning_compress.export import hugging_face
from lightning_compress.export.contents import Contents, block_contents, contents_of, warn_of_contents
from lightning_compress.export.model_card import write_card
from lightning_compress.export.save import dump_yaml, write_description
from lightning_compress.export.state_on_disk import state_on_disk
from lightning_compress.export.stream import Shard, ShardWriter
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import INDEX
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.memory import release
from lightning_compress.layers.records import records_of
from lightning_compress.quant.module_state import from_tensors, settle, to_tensors
from lightning_compress.quant.packing import check_fit
from lightning_compress.recipe import dump_recipe
from lightning_compress.resume.folder_log import ANEW, Resume, random_state, set_random_state, unable
from lightning_compress.resume.holder import Holder
from lightning_compress.resume.plan import batch_digests, difference, make_plan, read_plan, write_plan
from lightning_compress.team import Team

__all__ = ["ExportLog"]

Rows = Sequence[Mapping[str, Any]]
META = torch.device("meta")

logger = logging.getLogger(__name__)


class ExportLog:
    """A :class:`~lightning_compress.calibration.group_log.GroupLog` that writes what ``save`` would write.

    Args:
        model: Model of transformers on meta.
        blocks: Its blocks by name.
        source: The tensors of the dense model.
        names: Names of the tensors that ``save_pretrained`` writes.
        target: Folder to write.
        overwrite: Replace an earlier export of that name.
        resume: ``auto``: go on where a killed run ended. ``must``: there must be one. ``never``: begin anew.
        team: The processes that write together; the target lies on a file system that all of them see.
        shares: Whether they share the blocks.
    """

    def __init__(
        self,
        model: Any,
        blocks: Mapping[str, nn.Module],
        source: TensorFolder,
        names: Iterable[str],
        target: Path,
        overwrite: bool,
        resume: Resume,
        team: Team = Team(),  # noqa: B008  (frozen)
        shares: bool = False,
    ):
        self.model, self.blocks, self.source, self.resume = model, blocks, source, resume
        self.interrupt = NoLog().interrupt
        self.left_out = model.state_dict().keys() - names  # tied weights, and what the class does not save
        self.dense: dict[str, Any] = {}  # records of modules whose weight stays dense on disk
        self.team, self.shares = team, shares and not team.alone
        self._shards: dict[int, Shard] = {}  # of an earlier run
        self._rows: list[Row] = []
        self._groups: dict[str, tuple[Rows, list[Any]]] = {}  # of this rank: rows of the ledger, states of modifiers
        self._holder = Holder(target.with_name(f".{target.name}.lock")) if team.rank == 0 else None
        self.writer = ShardWriter(target, len(blocks) + 1, overwrite=overwrite, opens=team.rank == 0)

    @property
    def elsewhere(self) -> set[str]:
        """Names of blocks that other ranks compress; the empty name stands for the modules outside of blocks."""
        if not self.shares:
            return set()
        mine = [*self.team.mine(len(self.blocks))]
        return {name for i, name in enumerate(self.blocks) if i not in mine} | ({""} if self.team.rank else set())

    def begin(
        self,
        lifecycle: Lifecycle,
        state: State,
        batches: Sequence[Any],
        blocks: Mapping[str, nn.Module],
        options: CalibrationOptions,
    ) -> None:
        self._lifecycle, self._state, self._has_data = lifecycle, state, bool(batches)
        self._can_restore = all(modifier.group_state({}) is not None for modifier in lifecycle.modifiers)
        if self.shares and not self._can_restore:
            raise ValueError(
                f"{', '.join(unable(lifecycle.modifiers))} cannot share blocks between {self.team.size} ranks, as the "
                f"class has no group_state: use one process, or add it (docs/writing.md)"
            )
        data = batch_digests(batches, self.team, self.team)

        def open_log() -> list[Shard]:
            plan = make_plan(lifecycle.modifiers, nn.Module(), {}, data, list(blocks), options)
            kind = {"class": type(self.model).__name__, "dtype": str(self.model.dtype)}
            return self._open(plan | {"model": kind | _digests(self.source)})

        shards = self.team.result(open_log, "opening the log of the calibration")
        self._shards = {shard.number: shard for shard in shards}
        if not self.writer.log.is_dir():
            raise ValueError(
                f"rank {self.team.rank} does not see {self.writer.log}, which rank 0 has made; all ranks need the "
                f"target on one file system"
            )

    def _open(self, plan: dict[str, Any]) -> list[Shard]:
        """The shards of an earlier run; the folder is ready for further ones."""
        path = self.writer.log / "plan.json"
        if self.resume != "never" and path.exists():
            try:
                changes = difference(read_plan(path), plan)
            except ValueError as error:
                raise ValueError(f"the shards in {self.writer.folder} cannot be used: {error}; {ANEW}") from error
            if changes:
                raise ValueError(f"the shards in {self.writer.folder} belong to another run: {changes}; {ANEW}")
            shards = self.writer.finished(in_order=self._has_data)
            logger.info("going on in %s after %d finished blocks", self.writer.folder, len(shards))
            return shards
        if self.resume == "must":
            raise ValueError(f"resume='must', and {self.writer.folder} holds no run to go on with; check the folder")
        self.writer.discard()
        write_plan(path, plan)
        return []

    def restore(self, title: str, modules: Mapping[str, nn.Module]) -> bool:
        number = self._number(title)
        if self.shares and number and (number - 1) % self.team.size == 0:
            self.team.gather(None, f"the blocks before {title}")  # a rank that has ended is known by then
        if self.shares and (title if number else "") in self.elsewhere:
            if not number:
                self._exchange()
            return True
        shard = self._shards.get(number)
        if shard is None or not _is_whole(shard.facts):
            self._rows = self._state.ledger.rows
            if self._has_data and shard is not None:  # those after it saw its outputs
                self._shards = {earlier: one for earlier, one in self._shards.items() if earlier < number}
            return False
        from_tensors(modules, self.writer.read(shard), shard.facts["state"])
        for modifier, known in zip(self._lifecycle.modifiers, shard.facts["modifiers"], strict=True):
            modifier.load_group_state(modules, known)
        self._state.ledger.put(shard.rows)
        self._groups[title] = shard.rows, shard.facts["modifiers"]
        set_random_state(shard.facts["random"])
        self.dense |= shard.facts["dense"]
        return True

    def store(self, title: str, modules: Mapping[str, nn.Module]) -> None:
        earlier = set(map(id, self._rows))
        rows = [asdict(row) for row in self._state.ledger.rows if id(row) not in earlier]
        known = [modifier.group_state(modules) for modifier in self._lifecycle.modifiers]
        self._groups[title] = rows, known
        if number := self._number(title):
            release()  # what rounding has freed, before packing needs memory
            contents = block_contents(self.model, modules)
            tensors, facts = self._restorable(contents, modules)

            def write() -> None:
                self._write(number, self.blocks[title], contents, tensors, rows, state=facts, modifiers=known)

            write() if self.shares else self.team.result(write, f"writing {title}")
            if facts is not None and self._has_data:
                settle(modules, tensors, facts)
        elif self.shares:
            self._exchange()

    def _exchange(self) -> None:
        """Give all ranks what each has of its groups: shards, rows, states of modifiers, records without values."""
        modules = modules_outside(self.model, self.blocks) if self.team.rank == 0 else {}
        for name, block in self.blocks.items():
            modules |= modules_of_block(name, block) if name not in self.elsewhere else {}
        records = {name: [record.to(META) for record in records_of(module)] for name, module in modules.items()}
        mine = self._groups, {name: each for name, each in records.items() if each}, self.writer.shards(), self.dense
        groups: dict[str, tuple[Rows, list[Any]]] = {}
        for rank, (others, attached, shards, dense) in enumerate(self.team.gather(mine, "compressing the blocks")):
            groups |= others
            self.dense |= dense
            self.writer.add(shards)
            for name, each in attached.items() if rank != self.team.rank else ():
                for record in each:
                    record.attach(self.model.get_submodule(name))
        ordered = [*self.blocks, *(title for title in groups if title not in self.blocks)]
        self._state.ledger.load_state_dict([dict(row) for title in ordered for row in groups[title][0]])
        for title in groups.keys() - self._groups.keys():
            for modifier, known in zip(self._lifecycle.modifiers, groups[title][1], strict=True):
                modifier.load_group_state({}, known)

    def restore_survey(self) -> Sequence[Modifier]:
        return ()

    def store_survey(self) -> None:
        """Modifiers with a survey are refused before."""

    def restore_training(self, title: str) -> TrainingState | None:
        return None

    def store_training(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Modifiers that train after the walk are refused before."""

    def finish(self, processors: Sequence[Any]) -> None:
        """Write the modules outside of blocks and all other files; the folder gets its name."""
        contents = contents_of(self.model, {})
        inside = tuple(f"{name}." for name in self.blocks)
        outside = {name: pair for name, pair in contents.records.items() if not name.startswith(inside)}
        rest = replace(contents, records=outside, caches={})
        tensors = {key: value for key, value in state_on_disk(rest).items() if not key.startswith(inside)}
        self._write(self.writer.count, self.model, rest, tensors, [], state=None, modifiers=[])
        warn_of_contents(contents)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            hugging_face.write_configs(self.model, folder)
            fault = write_description(contents, folder, {name: name for name in contents.records}, self.dense)
            for processor in processors:
                processor.save_pretrained(folder)
            recipe = dump_yaml(dump_recipe(self._lifecycle.modifiers))
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            size = sum(shard.tensor_bytes for shard in self.writer.shards())
            replaced = self.writer.target
            write_card(contents, folder, weight_bytes=size, fault=fault, recipe_yaml=recipe, replaced=replaced)
            for path in sorted(folder.iterdir()):
                if path.suffix != ".safetensors" and path.name != INDEX:
                    shutil.move(path, self.writer.folder / path.name)
        self.writer.finish()

    def close(self) -> None:
        """Let other processes have the folder; one without a shard is removed."""
        if self._holder is None:
            return
        if self.writer.is_empty:
            shutil.rmtree(self.writer.folder, ignore_errors=True)
        self._holder.release()
        shutil.rmtree(self._holder.path.parent, ignore_errors=True)

    def _number(self, title: str) -> int:
        """The shard of a block; 0 for the modules outside of blocks."""
        return 1 + list(self.blocks).index(title) if title in self.blocks else 0

    def _restorable(
        self, contents: Contents, modules: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
        """What ``save`` writes of a block, and how to restore the block from it; None where that is not possible."""
        if self._can_restore and not contents.dense and not contents.caches:
            tensors, facts = to_tensors(modules)
            is_plain = not any("._lightning_compress" in key for key in tensors) and not facts["same"]
            if is_plain and set(facts["packed"]) == set(contents.packed):
                return tensors, facts
        tensors, prefix = state_on_disk(contents), f"{next(iter(modules))}."
        return {key: value for key, value in tensors.items() if key.startswith(prefix)}, None

    def _write(
        self,
        number: int,
        module: nn.Module,
        contents: Contents,
        tensors: Mapping[str, Tensor],
        rows: Sequence[Mapping[str, Any]],
        **facts: Any,
    ) -> None:
        if broken := nonfinite(module):
            raise ValueError(
                f"NaN or Inf in {len(broken)} parameters or buffers, such as {shortlist(broken)}; such a model is not "
                f"exported"
            )
        dense = {name: contents.records[name] for name in contents.dense if name in contents.records}
        for name, pair in dense.items():
            check_fit(name, *pair)
        records = {name: record.to_json() for name, (_, record) in dense.items()}
        tensors = {key: value for key, value in tensors.items() if key not in self.left_out}
        self.writer.write(number, tensors, {"dense": records, **facts, "random": random_state()}, rows)
        self.dense |= records


def _is_whole(facts: Mapping[str, Any]) -> bool:
    """Whether a shard holds what restores its block."""
    return {key: type(value) for key, value in facts.items()} == {
        "dense": dict, "state": dict, "modifiers": list, "random": dict
    }  # fmt: skip


def _digests(source: TensorFolder) -> dict[str, str]:
    """Size, time and header of each file of the dense model; their content is not read."""
    digests = {}
    for file in {file.path: file for file in source.files.values()}.values():
        state, names = file.path.stat(), "\n".join(file.names)
        digests[file.path.name] = f"{state.st_size} {state.st_mtime_ns} {hashlib.sha256(names.encode()).hexdigest()}"
    return digests
