"""The tuner with a clock that is made up: what is left out, what is checked, what is written."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import checking, replay, tune_ops, tuned_ops
from benchmarks.op_cases import Case, Trial
from benchmarks.tune_ops import main, sizes, tune
from benchmarks.tuned_ops import SUBJECTS, Subject
from lightning_compress.ops.launches import LaunchTable
from tests.ops.test_launches import Launch

CPU = torch.device("cpu")
MICROSECONDS = {1: 10.0, 2: 9.9, 3: 5.0, 4: 4.0, 5: 3.0, 6: 7.0}  # of blocks; 10.0 is the rule's


def subject(path: Path, wrong=()):
    path.write_text("{}")

    def case(shape, ours, others):
        def call(launch):
            return lambda: torch.full(shape, 2.0 if launch.block in wrong else 1.0)

        def make(device, dtype, seed):
            return Trial(call(ours), {name: call(launch) for name, launch in others.items()}, lambda: torch.ones(shape))

        made = Case("op", "3", 1, 1, 1e-3, make)
        object.__setattr__(made, "launches", {"ours": ours, **others})
        return made

    table = LaunchTable(path, Launch, exact=("N",), at_most="M")
    candidates = lambda shape, processors: (Launch(block, True) for block in range(1, 7))  # noqa: E731
    at = lambda shape: dict(zip("MN", shape, strict=True))  # noqa: E731
    return Subject(table, ("M", "N"), [(1, 64)], candidates, at, case, lambda *_: None)


def clock(case, names):
    return {name: MICROSECONDS[case.launches[name].block] for name in names}


def check(case):
    return checking.checked(case, CPU).errors


def tuned(path, wrong=(), faults=None):
    fault = lambda launch: (faults or {}).get(launch.block)  # noqa: E731
    return tune(subject(path, wrong), (2, 64), 132, fault=fault, check=check, clock=clock)


def test_the_quickest_that_is_right_and_compiles_is_taken(tmp_path):
    found = tuned(tmp_path / "t.json", wrong=(4,), faults={5: "spills: 3 times", 6: "shared memory: too much"})
    assert found.entry["launch"] == {"block": 3, "fast": True}
    assert found.entry["at"] == {"M": 2, "N": 64}
    assert (found.entry["us"], found.entry["rule_us"]) == (5.0, 10.0)
    assert (found.tried, sorted(found.refused)) == (6, ["shared memory", "spills", "wrong"])
    assert "Launch(block=4, fast=True): relative error 1.0" in found.refused["wrong"]


def test_two_percent_are_needed_to_replace_the_rule(tmp_path):
    found = tuned(tmp_path / "t.json", wrong=(3, 4, 5, 6))
    assert found.entry["launch"]["block"] == 1
    assert found.entry["us"] == found.entry["rule_us"] == 10.0


def test_contestants_are_timed_a_few_at_a_time_each_time_beside_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_ops, "TOGETHER", 2)
    assert tuned(tmp_path / "t.json").entry["launch"]["block"] == 5


def test_where_the_rule_is_wrong_or_nothing_compiles_there_is_no_entry(tmp_path):
    assert tuned(tmp_path / "t.json", wrong=(1,)).entry is None
    assert tuned(tmp_path / "t.json", faults=dict.fromkeys(range(7), "spills: 1 times")).entry is None


def test_entries_are_written_for_the_gpu_at_hand(tmp_path, monkeypatch, capsys):
    one = subject(tmp_path / "t.json")
    properties = argparse.Namespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(replay, "times", lambda case, device, names, rounds: clock(case, names))
    monkeypatch.setattr(Subject, "fault", lambda self, shape, launch, capability, folder: None)
    arguments = tune_ops.parse(["--dry"])
    assert tune_ops.tune_all({"op": one}, {"op": [(1, 64)]}, arguments, CPU) == 0
    assert one.table.read() == {}
    assert tune_ops.tune_all({"op": one}, {"op": [(1, 64), (16, 64)]}, tune_ops.parse([]), CPU) == 0
    assert [row["at"]["M"] for row in one.table.read()["H200"]] == [1, 16]
    assert one.table.find("H200", {"M": 9, "N": 64}) == Launch(5, True)
    assert tune_ops.tune_all({"op": one}, {"op": [(1, 64)]}, tune_ops.parse(["--seconds", "-1"]), CPU) == 0
    assert "not tuned, -1 s are over" in capsys.readouterr().out


def test_what_is_asked_wrongly_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--ops", "mask_2of4"]) == 2
    assert "mask_2of4 has no table; expected w4a16_gemm, hessian" in capsys.readouterr().err
    assert main(["--shapes", "1x2x3"]) == 2
    assert "--shapes are those of one op" in capsys.readouterr().err
    assert main(["--ops", "hessian", "--shapes", "1x2x3"]) == 2
    assert "expected a shape NxC, got '1x2x3'" in capsys.readouterr().err
    assert main(["--ops", "hessian", "--shapes", "64x512"]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert sizes("16x4096X32", "MNK") == (16, 4096, 32)


def test_a_launch_beyond_the_limits_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
    from tests.support import triton_compilation as compilation

    one = subject(tmp_path / "t.json")
    fine = {"spills": 0, "stack": 0, "shared": 1000, "hazards": 0}
    for found, message in (
        (fine, None), (fine | {"spills": 4}, "spills: 4 times"), (fine | {"stack": 16}, "spills: 0 times, stack 16"),
        (fine | {"shared": 250_000}, "shared memory: 250000 bytes of 232448"),
        (fine | {"hazards": 2}, "hazards: 2 writes to registers that a product still reads"),
    ):  # fmt: skip
        monkeypatch.setattr(compilation, "inspect_code", lambda kernel, folder, found=found: found)
        reason = one.fault((1, 64), Launch(1, True), 90, tmp_path)
        assert reason is None if message is None else reason.startswith(message)

    def broken(kernel, folder):
        raise RuntimeError("ptxas")

    monkeypatch.setattr(compilation, "inspect_code", broken)
    assert one.fault((1, 64), Launch(1, True), 90, tmp_path) == "does not compile: RuntimeError"


@pytest.mark.parametrize(("op", "shape"), [("w4a16_gemm", (3, 40, 256)), ("hessian", (70, 136))])
def test_shapes_and_tables_of_the_ops_fit(op, shape):
    """What the tuner would write is an entry of the op's table."""
    pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
    one = SUBJECTS[op]
    launches = list(one.candidates(shape, 132))
    assert one.table._fault(one.entry(shape, launches[-1])) is None
    assert all(len(usual) == len(one.sizes) for usual in one.usual)
    case = one.case(shape, launches[0], {"0": launches[1]})
    trial = case.make(CPU, torch.float32, 0)
    assert trial.exact().isfinite().all()
    assert set(trial.contestants) == {"0"}
    assert tuned_ops.descriptors() or torch.cuda.is_available()
