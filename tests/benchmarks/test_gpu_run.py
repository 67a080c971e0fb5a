"""benchmarks/gpu_run.sh with an interpreter that fails, crashes and hangs: each costs its own step and nothing else."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.op_cases import cases

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_run.sh"
STUB = """#!/bin/bash
echo "called: $*"
case "$*" in
  -c*) echo "2.11.0 3.6.0 NVIDIA H200" ;;
  *--merge*) cat "${@: -1}"/*/ops_*.json >"$BENCH_RESULTS/ops_merged.json" ;;
  *--check*gptq_block) echo "wrong: relative error 1.0e+00"; exit 1 ;;
  *--check*) ;;
  *" hessian") kill -SEGV $$ ;;
  *" gptq_block") echo "an illegal memory access"; exit 3 ;;
  *" whole_gptq") echo "3 of 32 blocks"; trap "" TERM; sleep 60 & wait; wait; sleep 60 ;;
  *) echo "result of ${@: -1}" >"$BENCH_RESULTS/ops_stub.json" ;;
esac
"""


def run(tmp_path, *words, limit=100):
    stub = tmp_path / "bin/python3"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)


def test_what_fails_crashes_or_hangs_costs_its_step_alone(tmp_path):
    steps = ["check", "w4a16_gemm", "whole_gptq=1", "hessian", "gptq_block", "decode"]
    done = run(tmp_path, "60", *steps)
    assert done.returncode == 1, done.stderr
    lines = (tmp_path / "out/steps.txt").read_text().splitlines()
    told = {name: re.sub(r"\d+ s$", "N s", said) for name, said in (line.split(": ", 1) for line in lines)}
    assert told.pop("check of gptq_block") == "failed with status 1, N s"
    assert {said for name, said in told.items() if name.startswith("check of ")} == {"done, N s"}
    assert {name: said for name, said in told.items() if not name.startswith("check of ")} == {
        "w4a16_gemm": "done, N s",
        "whole_gptq": "failed, no end within N s",
        "hessian": "failed with status 139, N s",
        "gptq_block": "failed, the CUDA context ended, N s",
        "decode": "done, N s",
    }
    with tarfile.open(tmp_path / "out/gpu_run.tgz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
        log = archive.extractfile("./whole_gptq/log").read().decode()
    assert {"steps.txt", "machine.txt", "w4a16_gemm/ops_stub.json", "decode/ops_stub.json", "check/pack.log"} <= names
    assert "3 of 32 blocks" in log
    assert (tmp_path / "out/ops_merged.json").read_text() == "result of decode\nresult of w4a16_gemm\n"
    assert "NVIDIA H200" in done.stdout


def test_steps_that_no_time_is_left_for_are_named(tmp_path):
    done = run(tmp_path, "5", "w4a16_gemm", "decode")
    assert done.returncode == 1
    expected = "w4a16_gemm: failed, no time was left\ndecode: failed, no time was left\nreport: failed, no results\n"
    assert (tmp_path / "out/steps.txt").read_text() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["soon"], "gpu_run: expected a number of seconds, got 'soon'"),
        (["60", "hesian"], "gpu_run: 'hesian' is not a step; expected some of check memcheck"),
        (["60", "decode=x"], "gpu_run: expected STEP=SECONDS, got 'decode=x'"),
    ],
)
def test_wrong_arguments(tmp_path, words, message):
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_op_is_checked_and_timed():
    script = SCRIPT.read_text()
    ops = {case.op for case in cases(tiny=True)}
    checked = set(re.search(r'^OPS="(.*)"$', script, re.MULTILINE).group(1).split())
    assert checked == ops
    timed = set(re.findall(r"^bench (\w+) \d+$", script, re.MULTILINE))
    assert timed == ops | {"whole_gptq", "decode"}
