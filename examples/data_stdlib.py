"""The source text of Python's standard library, which every machine has; tokens are bytes.

A hash of its name assigns each file to a part, so that no file is in two parts and all machines have the same split.
"""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from examples.token_blocks import Part, TokenBlocks

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


class StdlibBytes(TokenBlocks):
    """Python's standard library as bytes; 80 % of the files for training, 8 validation, 8 test, 4 calibration.

    Args:
        block_length: Bytes per block.
        batch_size: Blocks per batch.
        train_blocks: Training blocks per epoch.
        val_blocks: Number of validation blocks.
        test_blocks: Number of test blocks.
        calibration_blocks: Number of calibration blocks.
        folder: Folder with ``*.py`` files; None: the library of this Python.
        num_workers: Processes that read the training blocks; any need torchdata.
    """

    def __init__(
        self,
        block_length: int = 128,
        batch_size: int = 16,
        train_blocks: int = 4000,
        val_blocks: int = 1024,
        test_blocks: int = 1024,
        calibration_blocks: int = 256,
        folder: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            block_length, batch_size, train_blocks, val_blocks, test_blocks, calibration_blocks, num_workers
        )
        self.folder = Path(folder or sysconfig.get_path("stdlib"))

    def streams(self) -> dict[Part, Tensor]:
        """Bytes of each part, uint8 [N].

        Raises:
            ValueError: The folder contains no Python files.
        """
        texts: dict[Part, list[bytes]] = {"train": [], "val": [], "test": [], "calibration": []}
        for path in sorted(self.folder.rglob("*.py")):
            name = path.relative_to(self.folder)
            if LEFT_OUT.isdisjoint(name.parts):
                texts[part_of(name.as_posix())].append(path.read_bytes())
        if not any(texts.values()):
            raise ValueError(f"{self.folder} holds no *.py files; set data.folder to a folder with Python source text")
        return {part: torch.frombuffer(bytearray(b"".join(t)), dtype=torch.uint8) for part, t in texts.items()}


def part_of(name: str) -> Part:
    """The part of a file, from its name relative to the library."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    if place < 80:
        return "train"
    if place < 88:
        return "val"
    return "test" if place < 96 else "calibration"
