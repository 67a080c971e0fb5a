"""Any text files, cut by the tokenizer of the model they are for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.token_blocks import PARTS, Part, TokenBlocks

SHARES: dict[Part, float] = {"train": 0.70, "val": 0.10, "test": 0.10, "calibration": 0.10}
SUFFIXES = (".txt", ".md")


class TextBlocks(TokenBlocks):
    """Text files as tokens.

    A part without a path of its own takes its share of ``path``: the first 70 % of the tokens to train on, then 10 each
    to validate, to test and to calibrate; the shares of parts that have their own are left out.

    Args:
        tokenizer: Folder or hub name.
        path: A file, a folder (its ``*.txt`` and ``*.md``, with subfolders, in order) or a list of them.
        val_path: The same, to validate on.
        test_path: The same, to test on.
        calibration_path: The same, to calibrate on.
        block_length: Tokens of a block.
        batch_size: Blocks of a batch.
        train_blocks: Blocks of an epoch.
        val_blocks: Blocks to validate on.
        test_blocks: Blocks to test on.
        calibration_blocks: Blocks to calibrate on.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None = None,
        test_path: str | Sequence[str] | None = None,
        calibration_path: str | Sequence[str] | None = None,
        block_length: int = 256,
        batch_size: int = 4,
        train_blocks: int = 2000,
        val_blocks: int = 64,
        test_blocks: int = 64,
        calibration_blocks: int = 64,
    ) -> None:
        super().__init__(block_length, batch_size, train_blocks, val_blocks, test_blocks, calibration_blocks)
        self.tokenizer = tokenizer
        self.path = path
        self.own: dict[Part, str | Sequence[str] | None] = {
            "val": val_path,
            "test": test_path,
            "calibration": calibration_path,
        }

    def streams(self) -> dict[Part, Tensor]:
        """Tokens of each part, int32 [N]."""
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)

        def tokens(path: str | Sequence[str]) -> Tensor:
            texts = (file.read_text(encoding="utf-8", errors="replace") for file in text_files(path))
            ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
            return torch.tensor([i for file_ids in ids for i in file_ids], dtype=torch.int32)

        shared: list[Part] = [part for part in PARTS if not self.own.get(part)]
        streams = dict(zip(shared, cut(tokens(self.path), [SHARES[part] for part in shared]), strict=True))
        return streams | {part: tokens(path) for part, path in self.own.items() if path}


def text_files(path: str | Sequence[str]) -> list[Path]:
    """The files that a path, or a list of paths, stands for.

    Raises:
        ValueError: One does not exist, or is a folder without text files.
    """
    files: list[Path] = []
    for entry in [path] if isinstance(path, str) else path:
        place = Path(entry).expanduser()
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in SUFFIXES)
        if not found:
            raise ValueError(
                f"{entry!r} is no text file, and no folder with {' or '.join(SUFFIXES)} files; check data.path"
            )
        files += found
    return files


def cut(stream: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Consecutive pieces of a stream [N], in proportion to ``shares``."""
    ends = [round(len(stream) * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
