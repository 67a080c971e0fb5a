"""Any text files, tokenized by the tokenizer of the model."""

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

    A part without its own path gets its share of ``path``: the first 70 % of the tokens for training, then 10 % each
    for validation, test and calibration; parts with their own path get no share.

    Args:
        tokenizer: Folder or hub name.
        path: A file, a folder (its ``*.txt`` and ``*.md``, with subfolders, in order) or a list of them.
        val_path: The same for validation.
        test_path: The same for the test.
        calibration_path: The same for calibration.
        block_length: Tokens per block.
        batch_size: Blocks per batch.
        train_blocks: Training blocks per epoch.
        val_blocks: Number of validation blocks.
        test_blocks: Number of test blocks.
        calibration_blocks: Number of calibration blocks.
        num_workers: Processes that read the training blocks; any need torchdata.
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
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            block_length, batch_size, train_blocks, val_blocks, test_blocks, calibration_blocks, num_workers
        )
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
    """The text files of a path, or of a list of paths.

    Raises:
        ValueError: One does not exist, or is a folder without text files.
    """
    files: list[Path] = []
    for entry in [path] if isinstance(path, str) else path:
        place = Path(entry).expanduser()
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in SUFFIXES)
        if not found:
            raise ValueError(
                f"{entry!r} is neither a text file nor a folder with {' or '.join(SUFFIXES)} files; check data.path"
            )
        files += found
    return files


def cut(stream: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Consecutive pieces of a stream [N], in proportion to ``shares``."""
    ends = [round(len(stream) * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
