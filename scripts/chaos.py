"""Kill calibrations and exports with SIGKILL at random moments, and compare what the runs that go on leave behind.

    make chaos ARGS="--kills 50 --seed 7 --results chaos.json"

Three kinds of chains take turns: one process, two ranks, and a number of ranks that changes at each attempt. A chain is
killed up to four times and ends with an attempt that is left alone: tensors and ledger must be those of a run without a
log. In a team one rank is killed, and the others must end by themselves. An attempt may lose the group of modules that
it was working on, and nothing that was stored before.

One process imports torch, and forks each rank.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_compress import GPTQModifier, save
from lightning_compress.calibration.group_log import GroupLog, NoLog
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Ledger, Lifecycle, State
from lightning_compress.resume.folder_log import FolderLog
from lightning_compress.team import Team

LAYERS, BATCHES, TOKENS = 6, 8, 256
KINDS = {"one process": (1, 1), "two ranks": (2, 2), "changing": (1, 2)}  # ranks of odd and of even attempts
SHARES = {"one process": 0.4, "two ranks": 0.4, "changing": 0.2}  # of the kills
ALONE = 60.0  # seconds in which the other ranks must end


def build() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": LAYERS, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def data() -> list[dict[str, torch.Tensor]]:
    generator, weights = torch.Generator().manual_seed(1), 1 / torch.arange(1, 513).float()
    return [
        {"input_ids": torch.multinomial(weights, TOKENS, replacement=True, generator=generator)[None]}
        for _ in range(BATCHES)
    ]


class Counting(FolderLog):
    """Notes which groups this attempt begins and stores."""

    def note(self, what: str) -> None:
        if self._state.team.rank == 0:
            with (self.folder.parent / "groups.txt").open("a") as file:
                file.write(f"{what} {self._number}\n")

    def restore(self, title: str, modules: Mapping[str, nn.Module]) -> bool:
        restored = super().restore(title, modules)
        self.note("restored" if restored else "begun")
        return restored

    def store(self, title: str, modules: Mapping[str, nn.Module]) -> None:
        super().store(title, modules)
        self.note("stored")


def attempt(folder: Path, rank: int, size: int, logged: bool) -> None:
    """One rank of one attempt."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    team, model = Team.of_processes(), build()
    lifecycle, state = Lifecycle([GPTQModifier(scheme="W4A16", ignore=["lm_head"])]), State(model, ledger=Ledger())
    state = state.but(team=team)
    log: GroupLog = Counting(folder / "log") if logged else NoLog()
    lifecycle.initialize(state)
    calibrate(lifecycle, state, data(), log=log)
    lifecycle.finalize(state)
    if rank == 0:
        save(model, folder / "out", overwrite=True)
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in state.ledger.state_dict()]
        (folder / "ledger.json").write_text(json.dumps(sorted(rows, key=lambda row: row["module"])))
    team.gather(None, "the export")


def fork(work: Callable[[], None], errors: Path) -> int:
    if (process := os.fork()) == 0:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
            warnings.simplefilter("ignore")
            work()
        except BaseException:
            errors.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    return process


def ended(processes: list[int], seconds: float) -> dict[int, int]:
    """Exit statuses of those that end in this time, by process."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(statuses) < len(processes) and time.monotonic() < end:
        for process in processes:
            if process not in statuses and os.waitpid(process, os.WNOHANG)[0]:
                statuses[process] = 0
        time.sleep(0.01)
    return statuses


def run(folder: Path, size: int, kill_after: float | None, victim: int = 0, logged: bool = True) -> dict[str, Any]:
    """An attempt; with ``kill_after`` seconds rank ``victim`` is killed, if it still works then."""
    (folder / "rendezvous").unlink(missing_ok=True)
    for path in folder.glob("error*.txt"):
        path.unlink()
    start = time.monotonic()
    works = [lambda rank=rank: attempt(folder, rank, size, logged) for rank in range(size)]
    processes = [fork(work, folder / f"error{rank}.txt") for rank, work in enumerate(works)]
    gone = ended(processes, 600.0 if kill_after is None else kill_after)
    result = {"killed": victim < size and processes[victim] not in gone and kill_after is not None, "hung": False}
    if result["killed"]:
        os.kill(processes[victim], signal.SIGKILL)
    left = [process for process in processes if process not in gone]
    gone |= ended(left, ALONE if result["killed"] else 600.0)
    for process in set(processes) - set(gone):
        result["hung"] = True
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    result["seconds"] = time.monotonic() - start
    if not result["killed"]:
        errors = [path.read_text() for path in sorted(folder.glob("error*.txt"))]
        result["failed"] = errors[0] if errors else None
    return result


def outcome(folder: Path) -> str:
    """One checksum of the export and the ledger."""
    files = [*sorted((folder / "out").glob("*.safetensors")), folder / "out" / "config.json", folder / "ledger.json"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def notes(folder: Path) -> list[tuple[str, int]]:
    """What the last attempt noted."""
    path = folder / "groups.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(what, int(number)) for what, number in (line.split() for line in lines)]


def chain(
    kind: str, folder: Path, seed: int, kills: int, seconds: Mapping[int, float], expected: str
) -> dict[str, Any]:
    """Up to four kills, then an attempt that is left alone; ``seconds`` are those of an attempt, by number of ranks."""
    chance, stored = random.Random(seed), set[int]()
    counts = ("kills", "kills_on_two_ranks", "kills_before_another_number", "twice", "lost", "hung")
    facts: dict[str, Any] = {"kind": kind, "seed": seed, **dict.fromkeys(counts, 0)}
    while True:
        size = KINDS[kind][facts["kills"] % 2]
        moment = chance.uniform(0.1, 1.0) * seconds[size] if facts["kills"] < min(4, kills) else None
        result = run(folder, size, moment, chance.randrange(size))
        facts["hung"] += result["hung"]
        lines = notes(folder)
        begun = {number for what, number in lines if what == "begun"}
        facts["lost"] += len(begun & stored)  # stored before this attempt, and not taken from the log
        stored |= {number for what, number in lines if what == "stored"}
        facts["twice"] = max(facts["twice"], len(begun - stored))
        if not result["killed"]:
            break
        facts["kills"] += 1
        facts["kills_on_two_ranks"] += size == 2
        facts["kills_before_another_number"] += kind == "changing"
    facts |= {"failed": result["failed"], "equal": result["failed"] is None and outcome(folder) == expected}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    build()  # imports transformers before forking
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    seconds: dict[int, float] = {}
    references = {}
    for name, size, logged in (("plain", 1, False), ("one", 1, True), ("two", 2, True)):
        folder = root / name
        folder.mkdir()
        result = run(folder, size, None, logged=logged)
        assert result["failed"] is None, result["failed"]
        references[name], seconds[size] = outcome(folder), result["seconds"]
        print(
            json.dumps({"reference": name, "seconds": round(result["seconds"], 1), "sha256": references[name][:16]}),
            flush=True,
        )
    chains, left = [], {kind: round(share * options.kills) for kind, share in SHARES.items()}
    seed = options.seed
    while any(count > 0 for count in left.values()):
        for kind in [kind for kind, count in left.items() if count > 0]:
            folder = root / str(seed)
            folder.mkdir()
            chains.append(chain(kind, folder, seed, left[kind], seconds, references["plain"]))
            left[kind] -= chains[-1]["kills"]
            print(json.dumps(chains[-1]), flush=True)
            shutil.rmtree(folder)
            seed += 1
    sums = {name: sum(one[name] for one in chains) for name in chains[0] if isinstance(chains[0][name], int)}
    sums = {name: count for name, count in sums.items() if name not in ("seed", "equal", "twice")}
    summary = sums | {
        "chains": len(chains), "equal": sum(one["equal"] for one in chains),
        "most_groups_twice": max(one["twice"] for one in chains),
        "references_equal": len(set(references.values())) == 1, "seed": options.seed,
    }  # fmt: skip
    print(json.dumps(summary), flush=True)
    if options.results:
        options.results.write_text(json.dumps({"summary": summary, "chains": chains}, indent=1) + "\n")
    shutil.rmtree(root)
    right = (
        summary["equal"] == len(chains) and not sums["lost"] and not sums["hung"] and summary["most_groups_twice"] <= 1
    )
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
