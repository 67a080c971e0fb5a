"""Shards that do not hold all of their block are written again after a kill; the others are restored."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import KVCacheModifier, QuantizationModifier, compress_folder
from lightning_compress.export.stream import ShardWriter
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.resume.export_log import ExportLog


@pytest.fixture
def source(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=16, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def tensors_of(folder):
    files = TensorFolder(folder)
    return {name: files.read(name) for name in files.files}


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: [QuantizationModifier(scheme="W8A16", group_size=32, ignore=["lm_head"])], [3]),
        (
            lambda: [KVCacheModifier(), QuantizationModifier(scheme="W8A16", group_size=32, ignore=["lm_head"])],
            [1, 2, 3],
        ),
    ],
    ids=["restored", "again"],
)
def test_what_is_written_after_a_kill(tmp_path, source, monkeypatch, make, numbers):
    batches = [{"input_ids": torch.arange(8)[None]}]
    compress_folder(source, tmp_path / "expected", make(), batches)
    with monkeypatch.context() as patch:
        patch.setattr(ExportLog, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress_folder(source, tmp_path / "out", make(), batches)
    written, write = [], ShardWriter.write

    def note(self, number, *args, **kwargs):
        written.append(number)
        return write(self, number, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "write", note)
    compress_folder(source, tmp_path / "out", make(), batches)
    assert written == numbers
    ours, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in ours)
