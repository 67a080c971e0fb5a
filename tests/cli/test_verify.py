"""``lightning-compress verify``: its lines and exit codes; the checks are in tests/export/test_folder_checks.py."""

import pytest

from lightning_compress import compress_folder
from lightning_compress.cli import main


@pytest.fixture(scope="module")
def exported(tmp_path_factory, source):
    target = tmp_path_factory.mktemp("exported") / "w8"
    compress_folder(source, target, "rtn_w8")
    return target


def test_a_right_folder_passes_beside_its_dense_model(exported, source, text, capsys):
    arguments = ["verify", str(exported), "--dense", str(source), "--data", str(text), "--rows", "2", "--tokens", "16"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"ok    {name}" for name in ("files", "tensors", "shapes", "codes", "transformers", "dense")
    ]
    assert "perplexity" in lines[-1]


def test_a_failed_check_is_exit_code_1(exported, tmp_path, capsys):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        "FAIL  files: 'tokenizer.json' missing, which export_manifest.json lists; copy the folder again\n"
    )


def test_a_folder_that_is_not_there_is_exit_code_2(tmp_path, exported, capsys):
    assert main(["verify", str(tmp_path / "x")]) == 2
    assert main(["verify", str(exported), "--dense", str(tmp_path / "y")]) == 2
    assert capsys.readouterr().err == (
        f"lightning-compress: {tmp_path / 'x'} is not a folder\nlightning-compress: {tmp_path / 'y'} is not a folder\n"
    )
