"""kill -9, then ``ckpt_path="last"``: the run ends with the same bits as the run that was not killed.

Each recipe is killed again and again on its way: at the start of a batch, with gradients there, while a checkpoint is
written, before and during calibration, during the export, and while ``compressed.ckpt`` is written.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# steps 0 .. 9, three to an epoch; by recipe: where it is killed, in this order, each time resumed from the last
CHAINS = {
    "qat_lsq": [("batch", 2), ("writing", 4), ("batch", 6), ("finish",), ("export",), ("promote",)],
    "qat_ste": [("backward", 1), ("batch", 3), ("batch", 5), ("writing", 9)],
    "qat_static": [("batch", 1), ("backward", 4), ("batch", 7), ("export",)],
    "magnitude": [("batch", 2), ("batch", 3), ("writing", 6), ("batch", 8), ("calibration",)],
    "magnitude_2of4": [("batch", 1), ("batch", 4), ("finish",)],
    "magnitude_global": [("backward", 2), ("batch", 5), ("batch", 7), ("promote",)],
    "movement": [("batch", 2), ("backward", 3), ("writing", 6), ("batch", 8), ("finish",), ("promote",)],
    "movement_soft": [("batch", 1), ("writing", 4), ("batch", 7), ("export",)],
    "learned_mask": [("batch", 1), ("backward", 3), ("writing", 6), ("batch", 8), ("finish",)],
    "constant": [("batch", 2), ("writing", 3), ("batch", 5), ("batch", 8)],
    "distill_hidden": [("batch", 1), ("batch", 3), ("backward", 5), ("batch", 8)],
    "structured": [("batch", 2), ("writing", 5), ("finish",), ("promote",)],
    "structured_gradual": [("batch", 1), ("batch", 2), ("backward", 4), ("writing", 6), ("batch", 8), ("promote",)],
    "structured_late": [("batch", 2), ("batch", 3), ("backward", 6), ("promote",)],
    "stack_structured": [("batch", 1), ("batch", 4), ("finish",), ("export",), ("promote",)],
    "freeze": [("batch", 3), ("batch", 6)],
    "stack_qat": [("batch", 1), ("writing", 3), ("backward", 5), ("batch", 7), ("finish",), ("export",), ("promote",)],
    "stack_gptq": [("batch", 2), ("batch", 6), ("writing", 9), ("calibration",), ("export",), ("promote",)],
}

# the groups of a walk: 1 before the blocks, 2 to 4 the blocks, 5 after them; pruning: 1 the survey, 2 to 6. Then epochs
GROUPS = {
    "blocks_gptq": [("solved", 1), ("stored", 2), ("solved", 3), ("stored", 4), ("calibration",), ("export",)],
    "blocks_tune": [("stored", 2), ("trained", 1), ("trained", 2), ("tuned", 2), ("tuned", 4), ("export",)],
    "blocks_prune": [("stored", 2), ("solved", 4), ("solved", 4), ("stored", 6), ("export",), ("promote",)],
}

Attempt = Callable[..., bool]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    """``attempt(case, folder, kill)``: a run in a process of its own; True when it was killed."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen(
        [sys.executable, "-m", "tests.support.kill_runs"],
        cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert runner.stdin is not None
    assert runner.stdout is not None

    def attempted(case: str, folder: Path, kill: tuple[Any, ...] | None = None) -> bool:
        runner.stdin.write(json.dumps({"case": case, "folder": str(folder), "kill": kill}) + "\n")
        runner.stdin.flush()
        while (line := runner.stdout.readline()) and not line.startswith('{"killed"'):
            pass  # a table, a log line
        answer = json.loads(line)
        assert answer["failed"] is None, answer["failed"]
        return answer["killed"]

    yield attempted
    runner.stdin.close()
    runner.wait(60)


@pytest.mark.parametrize("case", CHAINS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, attempt: Attempt, case: str) -> None:
    assert not attempt(case, tmp_path / "whole")
    for moment in CHAINS[case]:
        assert attempt(case, tmp_path / "killed", moment), f"{moment} never came"
    assert not attempt(case, tmp_path / "killed")
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    if case == "stack_gptq":  # it validates after its last step, which draws a number, once more
        whole["callback"].pop("random")
        killed["callback"].pop("random")
    assert differences(whole, killed) == []
    assert whole["clock"] == {"steps": [9], "batches": 9}


@pytest.mark.parametrize("case", GROUPS)
def test_a_killed_calibration_goes_on_and_ends_with_the_same_bits(tmp_path: Path, attempt: Attempt, case: str) -> None:
    assert not attempt(case, tmp_path / "whole")
    for moment in GROUPS[case]:
        assert attempt(case, tmp_path / "killed", moment), f"{moment} never came"
    assert not attempt(case, tmp_path / "killed")
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []
    groups = (tmp_path / "killed" / "groups.txt").read_text().split()
    names = {"solved": "{}", "trained": "epoch-{}"}  # of work that is done twice
    lost = [names[what].format(*number) for what, *number in GROUPS[case] if what in names]
    assert sorted(groups) == sorted((tmp_path / "whole" / "groups.txt").read_text().split() + lost)
    assert not (tmp_path / "killed" / "calibration_log").exists()


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for times and paths."""
    saved = torch.load(folder / "compressed.ckpt", weights_only=True)
    trained = torch.load(folder / "kept" / "last.ckpt", weights_only=True)
    exported = folder / "compressed" / "model.safetensors"
    with (folder / "report" / "modules.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    own = saved["callbacks"]["CompressionCallback"]
    assert own.pop("run") == trained["callbacks"]["CompressionCallback"]["run"]
    own["facts"].pop("batches_repeated_on_resume", None)  # that a run was killed is a fact of its own
    own["ledger"] = [{name: value for name, value in row.items() if name != "seconds"} for row in own["ledger"]]
    summary = json.loads((folder / "report" / "summary.json").read_text())
    return {
        "weights": saved["state_dict"],
        "optimizers": saved["optimizer_states"],
        "exported": exported.read_bytes() if exported.exists() else None,
        "rows": rows,
        "metric": summary.get("metric"),
        "clock": own.pop("clock"),
        "callback": own,
        "trained": trained["state_dict"],
        "modifiers": trained["callbacks"]["CompressionCallback"]["modifiers"],
    }


def differences(one: Any, two: Any, place: str = "") -> list[str]:
    """Where two structures differ; tensors bit by bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [place]
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [line for key in one for line in differences(one[key], two[key], f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]")]
    return [] if one == two or (one != one and two != two) else [f"{place}: {one!r:.200} != {two!r:.200}"]
