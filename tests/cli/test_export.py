"""``lightning-compress export``: the tensors of the folder in another format."""

import pytest
import torch
from gguf import GGUFReader
from torch import nn

from lightning_compress import compress_folder, load, save
from lightning_compress.cli import main
from lightning_compress.export.gguf.write import write_gguf
from lightning_compress.export.hugging_face import processors


@pytest.fixture(scope="module")
def exported(tmp_path_factory, source):
    target = tmp_path_factory.mktemp("exported") / "q4"
    compress_folder(source, target, "rtn_q8_0", dtype=torch.bfloat16)
    return target


def test_gguf_with_the_tokenizer_of_the_folder(exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(exported), "--format", "gguf", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 0.")
    expected = write_gguf(load(exported, packed=False), tmp_path / "expected", processors=processors(exported))
    assert (out / "recipe.yaml").read_text() == (exported / "recipe.yaml").read_text()
    assert (out / "model.gguf").read_bytes() == (expected / "model.gguf").read_bytes()
    fields = GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 300
    arguments = ["export", str(exported), "--format", "gguf", "--out", str(out)]
    assert main(arguments) == 2
    assert "exists and is not empty; choose another, or replace an export by --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_compressed_tensors_again(exported, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(exported), "--format", "compressed_tensors", "--out", str(out)]) == 0
    one, two = load(exported, packed=False).state_dict(), load(out, packed=False).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_written(tmp_path, capsys):
    folder = save(nn.Linear(4, 4), tmp_path / "linear")
    assert main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "holds a model that transformers does not have" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
