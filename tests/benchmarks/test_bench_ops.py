"""The parts of the bench that need no GPU: what it is asked, the check of correctness, the tables and files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops, decode, machine, op_results, replay, whole_gptq
from benchmarks.bench_ops import deadlines, main
from benchmarks.checking import PATIENCE, Outcome, checked
from benchmarks.op_case import Case, Trial
from benchmarks.op_cases import cases
from benchmarks.op_report import op_tables, ratio

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.delenv("BENCH_WHEELS", raising=False)


def test_without_a_gpu_it_says_so_and_writes_nothing(capsys, tmp_path):
    assert main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_op_that_is_not_there(capsys):
    assert main(["--ops", "hesian"]) == 2
    said = capsys.readouterr().err
    assert "no cases of hesian; expected some of w4a16_gemm, hessian" in said
    assert "mask_2of4, " in said
    assert said.rstrip().endswith(", whole_gptq, decode")


def test_the_list_names_every_op_of_the_package(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kernels = (ROOT / "lightning_compress/ops").glob("*/kernel.py")
    assert {path.parent.name for path in kernels} <= {line.split(":")[0] for line in lines}
    assert len(set(lines)) == len(lines)
    assert main(["--list", "--ops", "decode"]) == 0
    assert capsys.readouterr().out.splitlines() == ["decode"]


ABSENT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = {"compressed_tensors", "hydra", "lightning", "omegaconf", "loguru", "pydantic", "safetensors",
                "torchmetrics", "transformers", "yaml", "rich", "numpy"}
        return None if name.partition(".")[0] in gone else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
from benchmarks.bench_ops import main
sys.exit(main(["--check"]))
"""


def test_it_runs_with_torch_alone():
    """Where a GPU is lent there is torch and Triton, and none of what the rest of this package needs."""
    command = [sys.executable, "-c", ABSENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "w4a16_gemm 65 x 192, M = 3" in done.stdout
    assert (
        "whole_gptq {} not run: pydantic, loguru, compressed_tensors, transformers missing; put the wheels"
        in done.stdout
    )
    assert "decode {'W4'" in done.stdout


@pytest.mark.parametrize("case", cases(tiny=True), ids=lambda case: f"{case.op}, {case.shape}")
def test_tiny_cases_are_right(case):
    outcome = checked(case, CPU)
    assert not outcome.note
    assert 0 <= outcome.errors["ours"] < case.tolerance
    assert len(outcome.errors) > 1, "no contestant"
    assert not outcome.left_out


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}, {case.shape}")
def test_cases_cost_something(case):
    assert case.moved > 0
    assert case.flop >= 0
    assert 0 < case.tolerance < 0.1


def made(ours, exact=lambda: torch.ones(3), other=lambda: torch.ones(3)):
    return Case("op", "3", 1, 1, 1e-3, lambda device, dtype, seed: Trial(ours, {"torch": other}, exact))


def test_what_is_wrong_is_not_timed():
    assert checked(made(lambda: torch.ones(3) * 1.01), CPU).note == (
        "wrong: relative error 1.0e-02, at most 1e-03 was expected"
    )
    assert checked(made(lambda: torch.full((3,), torch.nan)), CPU).note.startswith("wrong")
    assert checked(made(lambda: torch.empty(3)), CPU).note.startswith("wrong")  # memory is poisoned
    assert not torch.are_deterministic_algorithms_enabled()
    right = made(lambda: torch.ones(3), other=lambda: torch.ones(3) * 1.1)
    assert checked(right, CPU).left_out == {"torch": "wrong: relative error 1.0e-01"}
    assert not checked(right, CPU).note


def test_what_does_not_run_is_told():
    def broken():
        raise RuntimeError("no such | instruction\nat line 3")

    def absent():
        raise ModuleNotFoundError("No module named 'other'")

    assert checked(made(broken), CPU).note == "not run: RuntimeError: no such / instruction"
    found = checked(made(lambda: torch.ones(3), other=absent), CPU)
    assert (found.note, list(found.errors)) == ("", ["ours"])
    assert found.left_out == {"torch": "ModuleNotFoundError: No module named 'other'"}


def test_a_contestant_that_takes_too_long_drops_out():
    spent = {}
    case = made(lambda: torch.ones(3))
    assert "torch" in checked(case, CPU, spent).errors
    assert 0 < spent["torch"] < PATIENCE
    spent["torch"] = PATIENCE + 1
    assert checked(case, CPU, spent).left_out == {"torch": "its first calls have taken more than 60 s"}


def test_contestants_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    found = replay.in_turn(runs, 4, 100.0)
    assert order == list("ab") * 7  # three rounds warm up
    assert found == {"a": [7, 9, 11, 13], "b": [8, 10, 12, 14]}
    assert len(replay.in_turn(runs, 50, 0.0)["a"]) == 7  # the fewest, however little time there is


def test_slow_calls_are_fewer_in_a_graph(monkeypatch):
    """Times, all but CUDA: a graph runs its calls, and a call takes a millisecond, or a hundredth of it."""
    clock, ran = [0.0], []

    def call(name, seed, seconds):
        ran.append((name, seed))
        clock[0] += seconds

    def make(device, dtype, seed):
        return Trial(lambda: call("ours", seed, 1e-5), {"slow": lambda: call("slow", seed, 1e-3)}, lambda: None)

    def elapsed(run):
        before = clock[0]
        run()
        return clock[0] - before

    monkeypatch.setattr(replay, "captured", lambda run: lambda: [one() for one in run])
    monkeypatch.setattr(replay, "elapsed", elapsed)
    case = Case("op", "", int(0.9e8), 1, 1e-3, make)  # three sets of buffers go round 200 MB
    found = replay.rounds_of(case, CPU, ["ours", "slow"], 7)
    assert found == {"ours": [pytest.approx(10.0)] * 7, "slow": [pytest.approx(1000.0)] * 7}
    assert {seed for _, seed in ran} == {0, 1, 2}
    rounds = 7 + replay.WARM_UP
    assert sum(name == "ours" for name, _ in ran) == 2 + rounds * 18  # 20 calls, in whole turns of three
    assert sum(name == "slow" for name, _ in ran) == 2 + rounds * 5  # 5 ms
    assert replay.times(case, CPU, ["ours"], 7) == {"ours": pytest.approx(10.0)}


def test_who_cannot_be_captured_costs_the_others_nothing(monkeypatch):
    def captured(run):
        if run[0]() == "synchronizes":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: None

    monkeypatch.setattr(replay, "captured", captured)
    monkeypatch.setattr(replay, "elapsed", lambda run: 1.0)
    case = made(lambda: None, other=lambda: "synchronizes")
    left_out = {}
    assert replay.rounds_of(case, CPU, ["ours", "torch"], 7, left_out) == {"ours": [1e6] * 7}
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert left_out == {"torch": f"not captured: {reason}"}
    with pytest.raises(RuntimeError, match="not permitted"):
        replay.rounds_of(case, CPU, ["ours", "torch"], 7)
    with pytest.raises(RuntimeError, match="not permitted"):
        replay.rounds_of(made(lambda: "synchronizes"), CPU, ["ours"], 7, left_out)


def test_ratios_are_of_pairs():
    row = Outcome("op", "", times={"ours": 2.0, "torch": 3.0}, raw={"ours": [1, 2, 3], "torch": [3, 3, 3]})
    assert ratio(row, "torch") == 1.5
    row.raw = {"ours": [1, 2, 9], "torch": [4, 3, 9]}
    assert ratio(row, "torch") == 1.5
    assert ratio(row, "other") is None


def test_cells_of_what_was_not_measured_are_empty():
    errors = {"ours": 1e-3, "torch": 2e-3}
    outcomes = [
        Outcome("gemm", "8 x 8", {}, 1, errors, {"ours": 10.0, "torch": 20.0}, {}, 5.0, "memory"),
        Outcome("gemm", "9 x 9", {}, 1, errors, {"ours": 10.0, "torch": 5.0}, {}, 5.0),
        Outcome("gemm", "10 x 10", floor=7.0, note="not run", left_out={"torch": "too slow"}),
        Outcome("mask", "4", note="not run"),
    ]
    lines = op_tables(outcomes)
    assert "| 8 x 8 | 1.0e-03 | 10.0 | 50% memory | 20.0 | 2.00 |  |" in lines
    assert "| 10 x 10 |  |  |  |  |  | not run |" in lines
    assert "| 4 |  |  |  | not run |" in lines
    assert "- over torch: geometric mean 1.00, smallest 0.50, of 2 shapes" in lines
    assert "- torch: left out of 1 of 3 shapes: too slow" in lines


def test_what_a_section_leaves_over_is_the_next_ones():
    ends = deadlines(["w4a16_gemm", "hadamard", "whole_gptq"], 100.0, 500.0)
    assert ends == {"w4a16_gemm": 340.0, "hadamard": 380.0, "whole_gptq": 600.0}


def test_results_are_written(monkeypatch, tmp_path, capsys):
    """All but the clock: times, and what the GPU is called."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_ops, "rates", lambda device, rounds: (4e12, 8e14))
    monkeypatch.setattr(bench_ops, "rounds_of", lambda case, device, names, *rest: {n: [1.0, 2.0, 9.0] for n in names})
    chosen = [made(lambda: torch.ones(3)), made(lambda: torch.zeros(3))]
    assert bench_ops.bench(chosen, [], bench_ops.parse([]), CPU) == 1  # the second one is wrong
    (report_file,) = tmp_path.glob("ops_nvidia-h200_*.md")
    written = report_file.read_text()
    assert "# Kernels on one NVIDIA H200" in written
    assert "copies at 4.00 TB/s" in written
    facts = json.loads(report_file.with_suffix(".json").read_text())
    assert facts["gpu"] == "NVIDIA H200"
    assert [case["times"] for case in facts["cases"]] == [{"ours": 2.0, "torch": 2.0}, {}]
    assert facts["cases"][0]["raw"]["ours"] == [1.0, 2.0, 9.0]
    assert facts["seconds"].keys() == {"op"}
    assert all(goal["met"] is None for goal in facts["goals"])
    capsys.readouterr()
    assert bench_ops.bench(chosen[:1], [], bench_ops.parse(["--seconds", "0", "--dry"]), CPU) == 0
    results = op_results.Results(1.0, 1.0)
    assert bench_ops.measure(chosen, results, 1, CPU, 0.0, {}) == 2
    assert {outcome.note for outcome in results.outcomes} == {"not run: no time was left"}


def test_whole_runs_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_ops, "rates", lambda device, rounds: (4e12, 8e14))
    monkeypatch.setattr(whole_gptq, "LLAMA", whole_gptq.TINY)
    monkeypatch.setattr(decode, "LLAMA", decode.TINY)
    assert bench_ops.bench([], bench_ops.WHOLE, bench_ops.parse([]), CPU) == 0
    (report_file,) = tmp_path.glob("ops_nvidia-h200_*.md")
    assert "14 modules quantized" in report_file.read_text()
    facts = json.loads(report_file.with_suffix(".json").read_text())
    assert facts["whole_gptq"]["stages"].keys() == set(whole_gptq.STAGES)
    assert facts["decode"]["errors"]["W4"] < 1e-5
    (reached,) = [goal for goal in facts["goals"] if goal["unit"] == " s"]
    assert reached["reached"] == facts["whole_gptq"]["whole"] > 0


def test_the_report_says_what_was_cut():
    results = op_results.Results(4.3e12, 790e12, cut=["hadamard: 2 of 4 shapes"])
    lines = op_results.report(results, bench_ops.about("NVIDIA H200", {}))
    assert lines[0].startswith("This GPU copies at 4.30 TB/s, multiplies bf16 at 790 TFLOP/s; both measured here")
    assert "- hadamard: 2 of 4 shapes" in lines


def test_after_an_error_that_ends_the_context_nothing_more_is_tried(monkeypatch, tmp_path, capsys):
    """A context that has ended raises in every call, so what came next would fail for no fault of its own."""
    tried = []

    def illegal():
        tried.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_ops, "rates", lambda device, rounds: (4e12, 8e14))
    monkeypatch.setattr(bench_ops, "context_fault", lambda device: "an illegal memory access" if tried else "")
    monkeypatch.setattr(bench_ops, "rounds_of", lambda case, device, names, *rest: {n: [1.0] for n in names})
    chosen = [made(lambda: torch.ones(3)), made(illegal), made(illegal)]
    assert bench_ops.bench(chosen, ["decode"], bench_ops.parse([]), CPU) == 3
    assert len(tried) == 1
    facts = json.loads(next(tmp_path.glob("ops_nvidia-h200_*.json")).read_text())
    assert facts["cut"] == [
        "op: 1 of 3 shapes",
        "everything after op: the CUDA context has ended, an illegal memory access",
    ]
    assert [case["times"] for case in facts["cases"]] == [{"ours": 1.0, "torch": 1.0}, {}]
    assert facts["decode"] is None
    assert "the CUDA context has ended" in capsys.readouterr().err


def test_results_of_several_processes_become_one_report(monkeypatch, tmp_path, capsys):
    """Each step writes its own; a step that ran twice counts once; the roofline is that of the fastest rates."""
    about = bench_ops.about("NVIDIA H200", {})

    def step(name, copied, *outcomes, **whole):
        results = op_results.Results(copied, 8e14, seconds={name: 1.0}, **whole)
        for outcome in outcomes:
            results.add(outcome)
        monkeypatch.setattr(machine, "RESULTS", tmp_path / name)
        op_results.write(results, about)

    def row(op, microseconds):
        times = {"ours": microseconds, "matmul of dense weights": 20.0}
        return Outcome(op, "1 x 8192 x 8192", {"M": 1, "N": 8192, "K": 8192}, 1, {"ours": 1e-3}, times, moved=4_000_000)

    step("w4a16_gemm", 4e12, row("w4a16_gemm", 10.0))
    step("whole_gptq", 3e12, gptq=whole_gptq.Found(blocks=(3, 32), extrapolated=80.0, note="given up"))
    step("decode", 2e12, decoded=decode.Found({"bf16, as it is": 100.0, "W4, as it is": 150.0}))
    first, again = tmp_path / "w4a16_gemm", tmp_path / "again"
    shutil.copytree(first, again)
    (found,) = again.glob("*.json")
    facts = json.loads(found.read_text())
    facts["cases"][0]["times"]["ours"] = 5.0
    found.write_text(json.dumps(facts))
    os.utime(found, (2e9, 2e9))  # it ran later
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "report")
    assert main(["--merge", str(tmp_path)]) == 0
    written = next((tmp_path / "report").glob("ops_nvidia-h200_*.md")).read_text()
    assert "| 1 x 8192 x 8192 | 1.0e-03 | 5.0 | 20% memory | 20.0 | 4.00 |  |" in written  # 1 us at 4 TB/s
    assert "| all 32 blocks at the pace of the first 3 | 80.00 |" in written
    assert "| decode of that model, batch 1, over bf16 | >= 2x | 1.50x | no |" in written
    assert main(["--merge", str(tmp_path / "report")]) == 2
    assert "no results in" in capsys.readouterr().err
