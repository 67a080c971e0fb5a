"""Streams of tokens, cut into blocks of equal length and loaded as batches: base class of the demo's data."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import count as count_from
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Part = Literal["train", "val", "test", "calibration"]
PARTS: tuple[Part, ...] = ("train", "val", "test", "calibration")


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive blocks of a stream; an incomplete last block is dropped.

    Args:
        stream: Tokens, an integer tensor [N].
        length: Tokens per block.
    """

    def __init__(self, stream: Tensor, length: int) -> None:
        self.blocks = stream[: len(stream) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index].long()}


class Draws(Sampler[int]):
    """``count`` of ``size`` indices, drawn again in each epoch, the same on every rank.

    The order depends on the number of the epoch, so that a resumed run continues with the right order.
    Under DDP Lightning replaces a RandomSampler by one over the whole data set, and wraps any other sampler, whose
    ``set_epoch`` is then never called.

    Args:
        size: Number of indices to draw from.
        count: Number of indices per epoch.
        epoch: Returns the number of the epoch that begins; None: counted from 0.
        seed: Seed of the order of all epochs.
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
    """A loader without workers that has a state, so that a run resumes within an epoch."""

    given = first = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        first, self.first = self.first, 0  # only the first iterator after load_state_dict goes on
        return self._from(first)

    def _from(self, first: int) -> Iterator[dict[str, Tensor]]:
        assert self.batch_sampler is not None
        for place, indices in enumerate(self.batch_sampler):
            if place >= first:
                self.given = place + 1
                yield self.collate_fn([self.dataset[index] for index in indices])

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = self.first = state["given"] % len(self)  # after the last batch the next epoch begins


class TokenBlocks(lightning.LightningDataModule):
    """Four loaders over four streams: train, val, test and calibration.

    Only the training loader shuffles; the others always return the same blocks, evenly spread over their stream.

    Args:
        block_length: Tokens per block.
        batch_size: Blocks per batch.
        train_blocks: Training blocks per epoch, drawn again each time; all blocks if the stream has fewer.
        val_blocks: Number of validation blocks.
        test_blocks: Number of test blocks.
        calibration_blocks: Number of calibration blocks.
        num_workers: Processes that read the training blocks; any need torchdata, whose loader resumes within an epoch.
    """

    def __init__(
        self,
        block_length: int,
        batch_size: int,
        train_blocks: int,
        val_blocks: int,
        test_blocks: int,
        calibration_blocks: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.num_workers = num_workers
        self.block_length, self.batch_size = block_length, batch_size
        self.wanted = dict(zip(PARTS, (train_blocks, val_blocks, test_blocks, calibration_blocks), strict=True))
        self.parts: dict[Part, Blocks] = {}

    @abstractmethod
    def streams(self) -> dict[Part, Tensor]:
        """The tokens of each part, integer tensors [N]."""

    def setup(self, stage: str) -> None:
        """Read the text and cut it into blocks, once for all stages.

        Raises:
            ValueError: A part is shorter than one block.
        """
        if self.parts:
            return
        for part, stream in self.streams().items():
            blocks = Blocks(stream, self.block_length)
            if not len(blocks):
                raise ValueError(
                    f"the {part} text has {len(stream)} tokens, less than one block of {self.block_length}; "
                    f"give more text, or lower data.block_length"
                )
            if part != "train" and len(blocks) > self.wanted[part]:
                blocks.blocks = blocks.blocks[spread(len(blocks), self.wanted[part])]
            self.parts[part] = blocks

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        blocks = self.parts["train"]
        sampler = Draws(len(blocks), min(len(blocks), self.wanted["train"]), self._epoch)
        drop_last = len(blocks) >= self.batch_size
        if not self.num_workers:
            return ResumableLoader(blocks, self.batch_size, sampler=sampler, drop_last=drop_last)
        loader = stateful_loader(self.num_workers)  # by keywords: else Lightning cannot replace the sampler
        return loader(
            dataset=blocks,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
        )

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.parts["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.parts["test"], self.batch_size)

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Calibration data: text that is not used in training, validation or test."""
        return DataLoader(self.parts["calibration"], self.batch_size)


def stateful_loader(num_workers: int) -> Any:
    """The class of torchdata; ValueError where it is not installed."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ValueError(
            f"data.num_workers={num_workers} needs torchdata, whose loader resumes within an epoch: "
            f"pip install 'lightning-compress[loaders]', or set data.num_workers=0"
        ) from error
    return StatefulDataLoader


def spread(available: int, wanted: int) -> Tensor:
    """``wanted`` indices, int64, evenly spread over ``available`` positions."""
    return torch.arange(wanted) * available // wanted
