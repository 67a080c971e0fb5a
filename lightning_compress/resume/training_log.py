"""The last two states of a modifier that trains after the walk: a kill while one is written leaves the other.

They are shards 1 and 2 of ``<folder>/.training.partial/`` by turns (export/stream.py).

    facts: {"title": whose state it is, "number": from 1 up, "facts": its own, "random": torch's random
            state, "checksum": sha256 of all these}
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_compress.core.state import TrainingState
from lightning_compress.export.stream import ShardWriter
from lightning_compress.resume.plan import json_digest

__all__ = ["TrainingLog", "remove_training"]

NAME = "training"


class TrainingLog:
    """States in a folder; those that an earlier run has written are found again.

    Args:
        folder: Folder of the log.
    """

    def __init__(self, folder: Path):
        self._writer, self._number = ShardWriter(folder / NAME, 2), 0

    def read(self, title: str) -> tuple[TrainingState, Any] | None:
        """The last whole state of this title, and the random state with it; None where there is none."""
        states = {}
        for shard in self._writer.finished(in_order=False):
            facts = dict(shard.facts)
            if facts.pop("checksum", None) == json_digest(facts) and facts["title"] == title:
                states[facts["number"]] = shard, facts
        self._number = max(states, default=0)
        if not states:
            return None
        shard, facts = states[self._number]
        tensors = {name.partition(".")[2]: tensor for name, tensor in self._writer.read(shard).items()}
        return (tensors, facts["facts"]), facts["random"]

    def write(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], random: Any) -> None:
        """Keep a state, in place of the last but one."""
        self._number += 1
        entry = {"title": title, "number": self._number, "facts": dict(facts), "random": random}
        named = {f"{self._number}.{name}": tensor for name, tensor in tensors.items()}
        self._writer.write(1 + self._number % 2, named, entry | {"checksum": json_digest(entry)})


def remove_training(folder: Path) -> None:
    """Remove all states in the folder of a log."""
    shutil.rmtree(folder / f".{NAME}.partial", ignore_errors=True)
