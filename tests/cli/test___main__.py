"""The command as a process of its own."""

import subprocess
import sys


def test_a_real_process_ends_with_the_code_and_one_line(tmp_path, source):
    command = [sys.executable, "-m", "lightning_compress.cli", "run", str(source)]
    run = subprocess.run([*command, "gptq_w4", "--out", str(tmp_path / "x")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == ("lightning-compress: GPTQModifier of gptq_w4 needs calibration data: give --data TEXT_FILE\n")
    run = subprocess.run([*command, "rtn_w8", "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "plan and fact" in run.stdout
    assert (tmp_path / "out" / "config.json").is_file()
