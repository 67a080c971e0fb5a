"""Streams of tokens, cut into blocks of one length and handed out as batches: the part that the demo's data share."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Part = Literal["train", "val", "test", "calibration"]
PARTS: tuple[Part, ...] = ("train", "val", "test", "calibration")


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive blocks of a stream; the rest that fills no block is left out.

    Args:
        stream: Tokens, an integer tensor [N].
        length: Tokens of a block.
    """

    def __init__(self, stream: Tensor, length: int) -> None:
        self.blocks = stream[: len(stream) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index].long()}


class Draws(Sampler[int]):
    """``count`` of ``size`` indices, drawn anew each epoch, the same on every rank.

    Under DDP Lightning replaces a RandomSampler by one over the whole data set, and wraps any other sampler.
    """

    def __init__(self, size: int, count: int, seed: int = 0) -> None:
        self.size, self.count = size, count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=self.generator)[: self.count].tolist()


class TokenBlocks(lightning.LightningDataModule):
    """Four loaders over four streams: train, val, test and calibration.

    Only the training loader shuffles; the others hand out blocks spread evenly over their stream, always the same.

    Args:
        block_length: Tokens of a block.
        batch_size: Blocks of a batch.
        train_blocks: Blocks of an epoch, drawn anew each time; all of them where the stream holds fewer.
        val_blocks: Blocks to validate on.
        test_blocks: Blocks to test on.
        calibration_blocks: Blocks to calibrate on.
    """

    def __init__(
        self,
        block_length: int,
        batch_size: int,
        train_blocks: int,
        val_blocks: int,
        test_blocks: int,
        calibration_blocks: int,
    ) -> None:
        super().__init__()
        self.block_length, self.batch_size = block_length, batch_size
        self.wanted = dict(zip(PARTS, (train_blocks, val_blocks, test_blocks, calibration_blocks), strict=True))
        self.parts: dict[Part, Blocks] = {}

    @abstractmethod
    def streams(self) -> dict[Part, Tensor]:
        """The tokens of each part, integer tensors [N]."""

    def setup(self, stage: str) -> None:
        """Read the text and cut it; once, whatever the stage.

        Raises:
            ValueError: A part holds less than one block.
        """
        if self.parts:
            return
        for part, stream in self.streams().items():
            blocks = Blocks(stream, self.block_length)
            if not len(blocks):
                raise ValueError(
                    f"the {part} text holds {len(stream)} tokens, less than one block of {self.block_length}; "
                    f"give more text, or lower data.block_length"
                )
            if part != "train" and len(blocks) > self.wanted[part]:
                blocks.blocks = blocks.blocks[spread(len(blocks), self.wanted[part])]
            self.parts[part] = blocks

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        blocks = self.parts["train"]
        sampler = Draws(len(blocks), min(len(blocks), self.wanted["train"]))
        return DataLoader(blocks, self.batch_size, sampler=sampler, drop_last=len(blocks) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.parts["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.parts["test"], self.batch_size)

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """What compression calibrates on: text that neither training, nor validation, nor the test sees."""
        return DataLoader(self.parts["calibration"], self.batch_size)


def spread(available: int, wanted: int) -> Tensor:
    """``wanted`` indices, int64, evenly spread over ``available`` places."""
    return torch.arange(wanted) * available // wanted
