"""Rows of tokens from files: where they lie in the file, and what is refused."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from lightning_compress.cli.text_rows import text_batches, tokenizer_of


class Characters:
    """A tokenizer with one token for each character."""

    def __call__(self, text, truncation, max_length, verbose):
        assert truncation
        assert not verbose
        return {"input_ids": [ord(c) for c in text[:max_length]]}


def rows_of(batches):
    return ["".join(map(chr, row)) for batch in batches for row in batch["input_ids"].tolist()]


def test_rows_are_spread_over_the_file_and_begin_with_words(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(f"word{number:04} " for number in range(1000)))  # 9 bytes each
    batches = text_batches(path, Characters(), batches=3, rows=2, tokens=8)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8)] * 3
    assert batches[0]["input_ids"].dtype == torch.int64
    # the part of row k begins at byte 1500 k, inside of a word but where 9 divides it; the next word is the first
    assert rows_of(batches) == ["word0000", "word0167", "word0334", "word0501", "word0667", "word0834"]


def test_characters_of_several_bytes_are_never_torn(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("größe " * 400, encoding="utf-8")  # 8 bytes each
    rows = rows_of(text_batches(path, Characters(), batches=7, rows=1, tokens=5))
    assert rows == ["größe"] * 7


def test_lines_of_a_data_set_are_joined(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number}" * 10, "id": number}) + "\n" for number in range(8)))
    assert rows_of(text_batches(path, Characters(), batches=2, rows=1, tokens=4)) == ["0000", "4444"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a b c", "has too little text for 2 rows of 4 tokens: its shortest piece of 2 has 1 tokens; give"),
        ("x.txt", b"a\0b" * 100, "is not a text file: it holds zero bytes; expected text in UTF-8"),
        ("x.jsonl", b'{"text": "aaaa"}\n{"content": ""}\n', r"line 2: expected an object with a text, such as"),
        ("x.jsonl", b"aaaa\n", r"line 1: expected an object with a text"),
        ("x.jsonl", b'{"text": "aaaa"}\n', r"has too little text for 2 rows of 4 tokens: its shortest piece of 0 has"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_batches(tmp_path / name, Characters(), batches=1, rows=2, tokens=4)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no such file; expected a text file, or none for recipes without"):
        text_batches(tmp_path / "x.txt", Characters(), 1, 1, 1)


def test_the_tokenizer_of_a_folder(tmp_path, source):
    tokenizer = tokenizer_of(source)
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(source))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer, which --data needs"):
        tokenizer_of(tmp_path)


def test_an_encoder_with_a_decoder_is_refused(tmp_path, source):
    for file in source.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "model_type": "t5"}')
    with pytest.raises(ValueError, match="holds an encoder and a decoder, which take two texts"):
        tokenizer_of(tmp_path)
