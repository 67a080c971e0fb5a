"""The loaders of a Trainer after training: batches to calibrate on, and loaders to measure on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_compress.calibration.inputs import IN_TRAINER, check_batch, run_model
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.samples import OwnBatches, SideBySide, first_batches, seeded_view, share_of

__all__ = [
    "calibration_batches",
    "check_first_batch",
    "first_calibration_batch",
    "forward_of",
    "to_device",
    "validation_loaders",
]


def calibration_batches(
    trainer: Trainer, pl_module: LightningModule, options: CallbackOptions, own_batches: OwnBatches
) -> tuple[list[Any], str]:
    """Batches as the model gets them, on the offload device, and a sentence on which samples they hold.

    Raises:
        ValueError: There is no loader, or it is empty.
    """
    limit = 1 if trainer.fast_dev_run else options.calibration_batches
    loader, samples = own_batches.loader(_owners(trainer, pl_module)), "the first of calibration_dataloader()"
    if loader is None:
        loader, samples = seeded_view(_train_loader(trainer), limit, options.calibration.seed)
    device = options.calibration.offload_device
    offload = device is not None and not hasattr(pl_module, "calibration_step")  # which knows a batch by its tensors

    def prepare(batch: Any) -> Any:
        moved = to_device(trainer, pl_module, batch)
        return tree_map_only(Tensor, lambda t: t.to(device), moved) if offload else moved

    batches = [prepare(batch) for batch in first_batches(loader, limit)]
    if not batches:
        raise ValueError("the calibration loader is empty, expected at least one batch")
    if len(batches) < limit:
        rank_zero_warn(f"calibration_batches={limit}, but the loader gave {len(batches)}; calibrating on those")
    rank_zero_info(f"calibrating on {len(batches)} batches: {samples}")
    return batches, samples


def check_first_batch(
    trainer: Trainer, pl_module: LightningModule, module: nn.Module, own_batches: OwnBatches, batch: Any
) -> None:
    """Compare the first calibration batch with the model's ``forward`` as training begins; the model is not run.

    That is the first one of ``own_batches``, else ``batch``, a training batch as the model gets it.

    Raises:
        ValueError: The model cannot take it.
    """
    first = own_batches.first(_owners(trainer, pl_module))
    batches = [batch] if first is None else [to_device(trainer, pl_module, one) for one in first]
    if not batches:
        raise ValueError("the calibration loader is empty, expected at least one batch")
    if not hasattr(pl_module, "calibration_step") and not isinstance(batches[0], Iterator):
        check_batch(module, batches[0], IN_TRAINER)


def first_calibration_batch(
    trainer: Trainer, pl_module: LightningModule, options: CallbackOptions, own_batches: OwnBatches
) -> tuple[Any, int]:
    """The first batch, as the loader gives it, and how many there will be; before the Trainer has begun.

    Raises:
        ValueError: There is no loader, or it is empty.
    """
    limit = options.calibration_batches
    first = own_batches.first(_owners(trainer, pl_module))
    loader = own_batches.loader(_owners(trainer, pl_module)) if first is not None else _train_loader(trainer)
    if first is None:
        first = first_batches(seeded_view(loader, 1, options.calibration.seed)[0], 1)
    if not first:
        raise ValueError("the calibration loader is empty, expected at least one batch")
    size = sized_len(loader)
    return first[0], limit if size is None else min(limit, size)


def validation_loaders(
    trainer: Trainer, pl_module: LightningModule, eval_batches: int | None
) -> tuple[list[Any], list[int | None]]:
    """Loaders to measure on, and the number of batches of each.

    None of ``eval_batches`` means as many batches as the Trainer validates on.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and loop._data_source.is_defined():
        loop.setup_data()  # no validation has run; the loop knows all the ways to a loader
    loaders = trainer.val_dataloaders
    source = trainer.datamodule if trainer.datamodule is not None else pl_module
    if loaders is None and trainer.limit_val_batches != 0 and is_overridden("val_dataloader", source):
        share = partial(share_of, rank=trainer.global_rank, ranks=trainer.world_size)
        loaders = tree_map(share, source.val_dataloader())  # a language model needs no validation_step
    known = [int(n) if n != float("inf") else None for n in loop.max_batches]
    if trainer.val_dataloaders is not None and not loop._is_sequential:  # a batch holds one of every loader
        assert loop._combined_loader is not None
        loaders = SideBySide(loop._combined_loader)
        known = [None if None in known else max(n or 0 for n in known)]
    listed = list(loaders.values()) if isinstance(loaders, dict) else loaders
    listed = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    if not listed:
        rank_zero_info("no validation loader: the report will have no metric before and after")
    limits = known if len(known) == len(listed) else [None] * len(listed)
    cap = 1 if trainer.fast_dev_run else eval_batches
    sizes = [sized_len(loader) for loader in listed]
    limits = [size if limit is None else limit for limit, size in zip(limits, sizes, strict=True)]
    return list(listed), [cap if n is None else n if cap is None else min(n, cap) for n in limits]


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any, loader: int = 0) -> Any:
    """A batch as the LightningModule gets it: converted to the precision, and moved by the user's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


def forward_of(pl_module: LightningModule, batches: Sequence[Any]) -> Callable[[nn.Module, Any], Any]:
    """The user's ``calibration_step(batch, batch_idx)``, or the default way to run the model on a batch."""
    step = getattr(pl_module, "calibration_step", None)
    if step is None:
        return partial(run_model, advice=IN_TRAINER)
    index = {_identity(batch): i for i, batch in enumerate(batches)}
    return lambda module, batch: step(batch, index.get(_identity(batch), 0))


def _owners(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, ...]:
    """Objects that may have a ``calibration_dataloader``."""
    return trainer.datamodule, pl_module


def _train_loader(trainer: Trainer) -> Any:
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    source = trainer.fit_loop._data_source  # limit_train_batches=0: Lightning makes no training loader
    if not source.is_defined():
        raise ValueError(
            "this recipe calibrates on data, and there is neither a calibration_dataloader() on the datamodule nor a "
            "training loader; give one of them to the Trainer"
        )
    return source.dataloader()


def _identity(batch: Any) -> int | None:
    """The identity of a batch: that of its first tensor; moving a tensor to its own device does not change it."""
    return next((id(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
