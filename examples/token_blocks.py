"""Streams of tokens, cut into blocks of one length and handed out as batches: the part that the demo's data share."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import count as count_from
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

    The order follows from the number of the epoch, so that a resumed run goes on with the order of the next one.
    Under DDP Lightning replaces a RandomSampler by one over the whole data set, and wraps any other sampler, which then
    never hears of ``set_epoch``.

    Args:
        size: Indices to draw from.
        count: Indices of an epoch.
        epoch: Gives the number of the epoch that begins; None: counted from 0.
        seed: Of the first epoch's order, and so of all.
    """

    def __init__(self, size: int, count: int, epoch: Callable[[], int] | None = None, seed: int = 0) -> None:
        counter = count_from(0)
        self.size, self.count, self.seed = size, count, seed
        self.epoch = epoch or (lambda: next(counter))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.size, generator=generator)
        yield from torch.randperm(self.size, generator=generator)[: self.count].tolist()


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader without workers that goes on within an epoch: Lightning saves the state of a loader that has one.

    torchdata's StatefulDataLoader does the same with workers.
    """

    given = first = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        first, self.first = self.first, 0  # at the first batch: Lightning makes iterators that it does not use
        assert self.batch_sampler is not None
        for place, indices in enumerate(self.batch_sampler):
            if place >= first:
                self.given = place + 1
                yield self.collate_fn([self.dataset[index] for index in indices])

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"] % len(self)  # after the last batch the next epoch begins


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
        sampler = Draws(len(blocks), min(len(blocks), self.wanted["train"]), self._epoch)
        return ResumableLoader(blocks, self.batch_size, sampler=sampler, drop_last=len(blocks) >= self.batch_size)

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

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
