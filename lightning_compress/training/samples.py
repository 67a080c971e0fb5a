"""Calibration samples out of a training loader: chosen with a seed, in the dataset's order, never shuffled.

A training loader shuffles, so its first batches differ from run to run; the first samples of a dataset may all be of
one class. So samples are chosen among all with a seed, in ascending order, and collated by the loader's own function.
Random augmentation inside the dataset stays on; a ``calibration_dataloader`` of the datamodule avoids it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_compress.calibration.modes import forked_random_state

__all__ = ["OwnBatches", "SideBySide", "first_batches", "seeded_view", "share_of"]


def seeded_view(loader: Any, batches: int, seed: int) -> tuple[Iterable[Any], str]:
    """A loader of ``batches`` batches for calibration, and a sentence on which samples they hold.

    Args:
        loader: A training loader, a CombinedLoader, or a dict, list or tuple of such (then batches are structured in
            the same way).
        batches: Number of batches.
        seed: Seed of the choice.
    """
    if isinstance(loader, CombinedLoader):
        return seeded_view(loader.iterables, batches, seed)
    if isinstance(loader, Mapping | list | tuple):
        inner = loader if isinstance(loader, Mapping) else dict(enumerate(loader))
        views = {key: seeded_view(one, batches, seed) for key, one in inner.items()}
        note = "; ".join(f"{key}: {samples}" for key, (_, samples) in views.items())
        return _Together({key: view for key, (view, _) in views.items()}, type(loader)), note
    reason = _unindexable(loader)
    if reason is not None:
        return loader, f"its first {batches} batches as they come ({reason}, so the choice is the loader's)"
    population = _population(loader, seed)
    size = len(population)
    samples = min(batches * loader.batch_size, size)
    generator = torch.Generator().manual_seed(seed)
    indices = sorted(population[i] for i in torch.randperm(size, generator=generator, device="cpu")[:samples].tolist())
    view = DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last and samples >= loader.batch_size,
        generator=generator,  # the global random state stays untouched
    )
    first = ", ".join(map(str, indices[:8])) + (", ..." if samples > 8 else "")
    return view, f"{samples} of {size} samples, chosen with seed {seed}, in order: {first}"


def share_of(loader: Any, rank: int, ranks: int) -> Any:
    """The share of one rank in a loader that Lightning has not split: every ``ranks``-th sample, in order.

    All ranks get the same number (a sample may come twice), as from Lightning. A loader without indices goes to all.
    """
    if ranks == 1 or _unindexable(loader) is not None:
        return loader
    sampler: DistributedSampler[Any] = DistributedSampler(loader.dataset, ranks, rank, shuffle=False)
    return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


def first_batches(loader: Iterable[Any], batches: int) -> list[Any]:
    """At most ``batches`` batches of a loader."""
    return list(islice(iter(loader), batches))


class OwnBatches:
    """Batches of the user's ``calibration_dataloader``. Reading the first early loses none, not even of an iterator."""

    def __init__(self) -> None:
        self._opened: Iterable[Any] | None = None

    def first(self, owners: Sequence[Any]) -> list[Any] | None:
        """The first batch in a list, empty where there is none; None where none of the owners has the method."""
        loader = _own_loader(owners)
        if loader is None:
            return None
        begun = iter(loader)
        head = list(islice(begun, 1))
        self._opened = chain(head, begun) if begun is loader else loader
        return head

    def loader(self, owners: Sequence[Any]) -> Iterable[Any] | None:
        """The loader of :meth:`first`, once; else a new one; None where none of the owners has the method."""
        opened, self._opened = self._opened, None
        return _own_loader(owners) if opened is None else opened


def _own_loader(owners: Sequence[Any]) -> Iterable[Any] | None:
    """Result of the first ``calibration_dataloader`` among the owners; ValueError where it holds no batches."""
    for owner in owners:
        if (make := getattr(owner, "calibration_dataloader", None)) is not None:
            loader = make()
            if not isinstance(loader, Iterable) or isinstance(loader, Tensor | Mapping | str):
                raise ValueError(
                    f"{type(owner).__name__}.calibration_dataloader() returned {_a(loader)}, expected a DataLoader, a "
                    f"list or an iterator of batches; without that method samples of the training set calibrate"
                )
            return loader
    return None


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _population(loader: DataLoader[Any], seed: int) -> Sequence[int]:
    """Indices that the loader may yield; a sampler for a part of the dataset gives that part."""
    if isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    with forked_random_state():
        torch.manual_seed(seed)
        return sorted(set(loader.sampler))


def _unindexable(loader: Any) -> str | None:
    """Why samples cannot be chosen by index; None when they can."""
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} is not a DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "an iterable dataset"
    return "a batch sampler of its own" if loader.batch_size is None else None


class SideBySide:
    """The batches of a CombinedLoader without their numbers."""

    def __init__(self, loader: CombinedLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in iter(self.loader))


class _Together:
    """Batches of several loaders side by side, as a list, a tuple or ``{key: batch}``, until the first is exhausted."""

    def __init__(self, loaders: Mapping[Any, Iterable[Any]], kind: type[Any]):
        self.loaders, self.kind = loaders, kind

    def __iter__(self) -> Iterator[Any]:
        for batches in zip(*self.loaders.values(), strict=False):
            named = dict(zip(self.loaders, batches, strict=True))
            yield named if issubclass(self.kind, Mapping) else self.kind(batches)
