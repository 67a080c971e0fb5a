"""Rows of tokens from a text file of any size: equal pieces, spread over the file, each the beginning of a row.

Only as much of the file is read as the rows need.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.export import hugging_face
from lightning_compress.export.tensors import read_json

__all__ = ["text_batches", "tokenizer_of"]

BYTES_PER_TOKEN = 64  # more than any tokenizer needs on average
LONGEST_LINE = 2**26


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model that takes one text; ValueError where there is none."""
    processors = hugging_face.processors(folder)
    tokenizer = getattr(processors[0], "tokenizer", processors[0]) if processors else None
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(f"{folder} holds no tokenizer, which --data needs; save it beside the model")
    if read_json(folder / "config.json").get("is_encoder_decoder"):
        raise ValueError(
            f"{folder} holds an encoder and a decoder, which take two texts: call lightning_compress.compress with "
            f"batches of your own"
        )
    return tokenizer


def text_batches(path: Path, tokenizer: Any, batches: int, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Calibration batches, each ``input_ids`` [rows, tokens].

    Args:
        path: UTF-8 text. Of a ``.jsonl`` file, a data set with one object in each line, the key ``text`` counts.
        tokenizer: That of the model; it adds the special tokens that begin or end a text.
        batches: How many.
        rows: Rows of a batch.
        tokens: Tokens of a row.

    Raises:
        ValueError: The file is not there, is not text, or has too little of it.
    """
    if not path.is_file():
        raise ValueError(
            f"--data {path}: there is no such file; expected a text file, or none for recipes without data"
        )
    count = batches * rows
    pieces = _objects(path, count, tokens) if path.suffix == ".jsonl" else _pieces(path, count, tokens)
    ids = [tokenizer(piece, truncation=True, max_length=tokens, verbose=False)["input_ids"] for piece in pieces]
    shortest = min((len(row) for row in ids), default=0)
    if len(ids) < count or shortest < tokens:
        raise ValueError(
            f"--data {path} has too little text for {count} rows of {tokens} tokens: its shortest piece of {len(ids)} "
            f"has {shortest} tokens; give more text, or lower --batches, --rows or --tokens"
        )
    table = torch.tensor(ids, dtype=torch.int64, device="cpu")
    return [{"input_ids": batch} for batch in table.split(rows)]


def _pieces(path: Path, count: int, tokens: int) -> Iterator[str]:
    """The beginnings of ``count`` equal parts of the file, each from a new word on."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(count):
            start, end = number * size // count, (number + 1) * size // count
            file.seek(start)
            text = file.read(min(end - start, BYTES_PER_TOKEN * tokens))
            if b"\0" in text:
                raise ValueError(f"--data {path} is not a text file: it holds zero bytes; expected text in UTF-8")
            decoded = text.decode("utf-8", errors="ignore")  # a part may begin and end inside of a character
            yield decoded if number == 0 else decoded.partition(" ")[2]


def _objects(path: Path, count: int, tokens: int) -> Iterator[str]:
    """Texts of lines that follow each other, joined until they fill a row."""
    texts, length = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                text = json.loads(line)["text"]
                texts.append(text)
                length += len(text.encode())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f'--data {path}, line {number}: expected an object with a text, such as {{"text": "..."}}; '
                    f"{type(error).__name__}: {error}"
                ) from error
            if length >= 8 * tokens:  # most texts have 3 to 5 bytes a token
                yield "\n\n".join(texts)
                texts, length, count = [], 0, count - 1
                if not count:
                    return
