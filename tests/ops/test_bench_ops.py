"""The parts of the bench that need no GPU: what it is asked, the check of correctness, the tables and files."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops, machine
from benchmarks.bench_ops import Outcome, checked, main, report
from benchmarks.op_case import Case, Trial
from benchmarks.op_cases import cases

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)


def test_without_a_gpu_it_says_so_and_writes_nothing(capsys, tmp_path):
    assert main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_op_that_is_not_there(capsys):
    assert main(["--ops", "hesian"]) == 2
    assert "no cases of hesian; expected some of w4a16_gemm, hessian" in capsys.readouterr().err


def test_the_list_names_every_op_of_the_package(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kernels = (Path(__file__).parents[2] / "lightning_compress/ops").glob("*/kernel.py")
    assert {path.parent.name for path in kernels} <= {line.split(":")[0] for line in lines}
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("case", cases(tiny=True), ids=lambda case: f"{case.op}, {case.shape}")
def test_tiny_cases_are_right(case):
    outcome = checked(case, CPU)
    assert not outcome.note
    assert 0 <= outcome.errors["ours"] < case.tolerance
    assert len(outcome.errors) > 1, "no contestant"


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
    assert checked(made(lambda: torch.empty(3)), CPU).note.startswith("wrong")           # memory is poisoned
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_does_not_run_is_told(capsys):
    def broken():
        raise RuntimeError("no such | instruction\nat line 3")

    assert checked(made(broken), CPU).note == "not run: RuntimeError: no such / instruction"
    found = checked(made(lambda: torch.ones(3), other=broken), CPU)
    assert (found.note, list(found.errors)) == ("", ["ours"])
    assert "torch does not run" in capsys.readouterr().out


def test_cells_of_what_was_not_measured_are_empty():
    outcomes = [
        Outcome("gemm", "8 x 8", {"ours": 1e-3, "torch": 2e-3}, {"ours": 10.0, "torch": 20.0}, 5.0),
        Outcome("gemm", "9 x 9", {"ours": 1e-3, "torch": 2e-3}, {"ours": 10.0, "torch": 5.0}, 5.0),
        Outcome("gemm", "10 x 10", floor=7.0, note="not run"),
        Outcome("mask", "4", note="not run"),
    ]
    lines = report(outcomes, 4.3e12, 790e12)
    assert "Copies at 4.30 TB/s, bf16 product at 790 TFLOP/s" in lines[0]
    assert "| 8 x 8 | 1.0e-03 | 10.0 | 50% | 20.0 | 2.00 |  |" in lines
    assert "| 10 x 10 |  |  |  |  |  | not run |" in lines
    assert "| 4 |  |  |  | not run |" in lines
    assert "- over torch: geometric mean 1.00, smallest 0.50, of 2 shapes" in lines


def test_results_are_written(monkeypatch, tmp_path, capsys):
    """All but the clock: times, and what the GPU is called."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_ops, "rates", lambda device, rounds: (4e12, 8e14))
    monkeypatch.setattr(bench_ops, "times", lambda case, device, names, rounds: dict.fromkeys(names, 2.0))
    chosen = [made(lambda: torch.ones(3)), made(lambda: torch.zeros(3))]
    assert bench_ops.bench(chosen, bench_ops.parse([]), CPU) == 1                        # the second one is wrong
    (report_file,) = tmp_path.glob("ops_nvidia-h200_*.md")
    assert "# Ops on one NVIDIA H200, beside torch" in report_file.read_text()
    facts = json.loads(report_file.with_suffix(".json").read_text())
    assert facts["gpu"] == "NVIDIA H200"
    assert [case["times"] for case in facts["cases"]] == [{"ours": 2.0, "torch": 2.0}, {}]
    assert bench_ops.bench(chosen[:1], bench_ops.parse(["--seconds", "0", "--dry"]), CPU) == 0
    assert "not run" in capsys.readouterr().out
