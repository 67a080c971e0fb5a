"""``lightning-compress run``: the tensors of the library's functions, a report, and one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_compress import compress_folder, load
from lightning_compress.cli import main
from lightning_compress.cli.text_rows import text_batches, tokenizer_of
from lightning_compress.export.tensor_file import TensorFolder
from tests.cli.conftest import write_model

SIZES = ["--batches", "2", "--rows", "2", "--tokens", "16"]


def tensors_of(folder):
    files = TensorFolder(folder)
    return {name: files.read(name).numpy(force=True).tobytes() for name in files.files}


def test_it_writes_what_compress_folder_writes_and_a_report(tmp_path, source, text, capsys):
    out = tmp_path / "out"
    assert main(["run", str(source), "gptq_w4", "--data", str(text), "--out", str(out), *SIZES]) == 0
    printed = capsys.readouterr().out
    batches = text_batches(text, tokenizer_of(source), 2, 2, 16)
    compress_folder(source, tmp_path / "expected", "gptq_w4", batches)
    assert tensors_of(out) == tensors_of(tmp_path / "expected")
    summary = json.loads((tmp_path / "out-report" / "summary.json").read_text())
    assert (summary["model"], summary["recipe"], summary["modules"]) == ("LlamaForCausalLM", "gptq_w4", 14)
    assert summary["memory"] == "one block"
    assert summary["model_bytes_after"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert "plan: GPTQModifier on LlamaForCausalLM" in printed
    assert "plan and fact" in printed
    assert "seconds of calibration and export" in printed
    assert printed.endswith(f"report: {tmp_path / 'out-report' / 'index.html'}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out", "out-report"]


def test_a_recipe_for_the_whole_model_runs_in_memory(tmp_path, source, capsys):
    out = tmp_path / "out"
    recipe = tmp_path / "depth.yaml"
    recipe.write_text("compress: {modifiers: {depth: {type: DepthPruningModifier, layers: [1]}}}")
    assert main(["run", str(source), str(recipe), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the whole model goes into memory: DepthPruningModifier" in printed
    assert json.loads((tmp_path / "out-report" / "summary.json").read_text())["memory"] == "whole model"
    assert len(load(out).model.layers) == 1
    assert main(["run", str(source), str(recipe), "--out", str(tmp_path / "more"), "--memory", "1GB"]) == 2
    assert "--memory 1GB: DepthPruningModifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gptq_w4"], "GPTQModifier of gptq_w4 needs calibration data: give --data TEXT_FILE"),
        (["gptq_w5"], "did you mean"),
        (["qat_w4"], "QATModifier acts while a model trains, which this command does not do; use the recipe with"),
        (["rtn_w8", "--dtype", "int8"], "--dtype int8: expected bfloat16, float16 or float32"),
        (["gptq_w4", "--data", "nowhere.txt"], "--data nowhere.txt: there is no such file"),
        (["rtn_w8", "--rows", "0"], "rows=0, expected at least 1"),
        (["rtn_w8", "--seed", "-1"], "seed=-1: expected at least 0"),
        (["rtn_w8", "--resume", "must"], "resume='must'"),
    ],
    ids=str,
)
def test_errors_have_one_line_and_leave_nothing(tmp_path, source, capsys, arguments, message):
    assert main(["run", str(source), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("lightning-compress: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_written_over(tmp_path, source, capsys):
    (tmp_path / "note").write_text("mine")
    assert main(["run", str(source), "rtn_w8", "--out", str(tmp_path)]) == 2
    assert "exists and is not empty; choose another, or replace an export by --overwrite" in capsys.readouterr().err
    assert main(["run", str(source), "rtn_w8", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "this package did not write it" in capsys.readouterr().err
    assert main(["run", str(source), "rtn_w8", "--out", str(source), "--overwrite"]) == 2
    assert "is the folder of the dense model; choose another" in capsys.readouterr().err


def test_a_refused_recipe_is_exit_code_1(tmp_path, source, capsys):
    recipe = tmp_path / "refused.yaml"
    recipe.write_text("compress: {modifiers: {rtn: {type: QuantizationModifier, scheme: W4A16, group_size: 48}}}")
    assert main(["run", str(source), str(recipe), "--out", str(tmp_path / "out")]) == 1
    assert "refused" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_data_that_no_modifier_needs_is_named(tmp_path, source, text, capsys):
    assert main(["run", str(source), "rtn_w8", "--out", str(tmp_path / "out"), "--data", str(text)]) == 0
    assert f"the recipe rtn_w8 needs no data: {text} is not read" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(tmp_path, text):
    from tests.cli.conftest import write_tokenizer

    source = write_model(tmp_path / "dense", num_hidden_layers=40, hidden_size=128, intermediate_size=512)
    write_tokenizer(source)
    command = [sys.executable, "-m", "lightning_compress.cli", "run", str(source), "gptq_w4", "--data", str(text)]
    sizes = ["--batches", "4", "--rows", "1", "--tokens", "64"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out"), *sizes], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(tmp_path.glob(".out.partial/log/0001*.json")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = len(list(tmp_path.glob(".out.partial/log/0*.json")))
    assert finished >= 10
    assert not (tmp_path / "out").exists()
    assert main(["run", *command[4:], "--out", str(tmp_path / "out"), *sizes, "--resume", "must"]) == 0
    batches = text_batches(text, tokenizer_of(source), 4, 1, 64)
    compress_folder(source, tmp_path / "expected", "gptq_w4", batches)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
