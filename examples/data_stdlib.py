"""The source text of Python's standard library, which every machine has, bytes as tokens.

Files go to a part by a hash of their name, so that no file stands in two parts and the split is the same everywhere.
"""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from examples.token_blocks import Part, TokenBlocks

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


class StdlibBytes(TokenBlocks):
    """Python's standard library as bytes; 80 % of the files to train on, 8 to validate, 8 to test, 4 to calibrate.

    Args:
        block_length: Bytes of a block.
        batch_size: Blocks of a batch.
        train_blocks: Blocks of an epoch.
        val_blocks: Blocks to validate on.
        test_blocks: Blocks to test on.
        calibration_blocks: Blocks to calibrate on.
        folder: Where the ``*.py`` files lie; None: this Python's own library.
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
    ) -> None:
        super().__init__(block_length, batch_size, train_blocks, val_blocks, test_blocks, calibration_blocks)
        self.folder = Path(folder or sysconfig.get_path("stdlib"))

    def streams(self) -> dict[Part, Tensor]:
        """Bytes of each part, uint8 [N].

        Raises:
            ValueError: The folder holds no Python files.
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
    """The part that a file belongs to, by its name relative to the library."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    if place < 80:
        return "train"
    if place < 88:
        return "val"
    return "test" if place < 96 else "calibration"
