"""Errors before hours of training: what a Trainer and a recipe cannot do together."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_compress.core.events import Event
from lightning_compress.core.modifier import Modifier
from lightning_compress.training.sharding import shards
from lightning_compress.training.submodule import choose

__all__ = [
    "averages",
    "check_averaging",
    "check_fit",
    "check_lightning",
    "check_plain",
    "check_same_module",
    "check_whole",
    "check_windows",
    "tensor_bytes",
    "tensor_names",
    "warn_of_compressed_model",
    "warn_of_no_fit",
    "warn_of_stray_step",
]

TRUE_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def averages(callback: Callback) -> bool:
    """True for Lightning's callbacks that average weights (EMA, SWA), and for their subclasses."""
    return any(c.__name__ in AVERAGING for c in type(callback).__mro__)


def tensor_names(module: nn.Module) -> list[str]:
    """Names of parameters and buffers, in the order in which averaging pairs them."""
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def tensor_bytes(module: nn.Module, precision: str | None = None) -> int:
    """Bytes of all parameters and buffers; those of lazy modules are not known yet and count as 0.

    Args:
        module: The model.
        precision: Precision of the Trainer, which converts the model to ``bf16-true`` only after ``setup``.
    """
    dtype = TRUE_DTYPES.get(precision or "")
    tensors = (*module.parameters(), *module.buffers())
    return sum(
        t.numel() * (dtype.itemsize if dtype is not None and t.is_floating_point() else t.element_size())
        for t in tensors
        if not is_lazy(t)
    )


def check_lightning(trainer: Any, pl_module: Any) -> None:
    """ValueError for objects of pytorch_lightning, which has classes of its own under the same names."""
    for thing, expected in ((trainer, Trainer), (pl_module, LightningModule)):
        if not isinstance(thing, expected):
            raise ValueError(
                f"{type(thing).__name__} is a {expected.__name__} of pytorch_lightning, expected one of "
                f"lightning.pytorch, which is the same under another name: write import lightning.pytorch as pl (or "
                f"from lightning.pytorch import {expected.__name__}) in place of import pytorch_lightning as pl"
            )


def check_fit(trainer: Trainer, pl_module: LightningModule, callback: Callback, root: LightningModule | None) -> None:
    """ValueError for sharded weights, averaging that comes later, and another LightningModule than ``root``."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} shards the weights in flat pieces, and compression needs parameters: "
            f"use ModelParallelStrategy() with fully_shard in configure_model, strategy='ddp' or one device, or "
            f"compress the consolidated checkpoint afterwards, with compress()"
        )
    for other in trainer.callbacks[trainer.callbacks.index(callback) + 1 :]:
        if averages(other):
            name = type(other).__name__
            raise ValueError(
                f"{name} is listed after CompressionCallback and would overwrite the compressed weights with its "
                f"average: list it first, Trainer(callbacks=[{name}(...), CompressionCallback(...)])"
            )
    if root is not None and root is not pl_module:
        raise ValueError(
            "this CompressionCallback has compressed, or begun to compress, another LightningModule; "
            "make a new one for each model"
        )


def check_whole(trainer: Trainer, module: nn.Module) -> None:
    """ValueError for DTensors of another strategy than the one that knows them: any lets ``fully_shard`` pass."""
    sharded = [name for name, parameter in module.named_parameters() if hasattr(parameter, "device_mesh")]
    if sharded and not shards(trainer):
        raise ValueError(
            f"{sharded[0]!r} is sharded (a DTensor), and {type(trainer.strategy).__name__} does not save shards: give "
            f"the Trainer strategy=ModelParallelStrategy(), or train without fully_shard"
        )


def check_averaging(trainer: Trainer, module: str, reshaping: bool, added: bool) -> None:
    """Averages pair tensors by position, so a recipe may neither add tensors nor change their shapes."""
    averaging = [type(c).__name__ for c in trainer.callbacks if averages(c)]
    if averaging and reshaping:
        raise ValueError(
            f"{averaging[0]} averages weights of one shape, and a modifier of the recipe changes shapes: leave out "
            f"either of the two"
        )
    if averaging and added:
        raise ValueError(
            f"{averaging[0]} pairs tensors by position, and a modifier has added some to {module or 'the model'!r} "
            f"after it had copied them: leave out either of the two"
        )


def check_windows(trainer: Trainer, modifiers: Sequence[Modifier], event: Event) -> None:
    """ValueError for windows in epochs or fractions of unknown or changing length; warns of those past the end."""
    units = {m.unit for m in modifiers if m.start is not None} - {"step"}
    for unit in sorted(units):
        _ = event.in_unit(unit).steps_per_unit
    scheduled = [c for c in trainer.callbacks if type(c).__name__ == "GradientAccumulationScheduler"]
    if units and scheduled:
        raise ValueError(
            f"unit={min(units)!r} needs epochs of one length, but GradientAccumulationScheduler changes their "
            f"length; use unit='step'"
        )
    for modifier in modifiers if trainer.is_global_zero and not trainer.fast_dev_run else ():
        modifier.check_length(event)


def check_same_module(pl_module: LightningModule, name: str | None, model: nn.Module | None) -> None:
    """ValueError where the module of that name is no longer the one that the modifiers were initialized on."""
    chosen, module = choose(pl_module, name)
    if module is not model:
        raise ValueError(
            f"the module {chosen!r} is not the object that the modifiers were initialized on: it was replaced after "
            f"configure_model; build it in __init__, setup or configure_model"
        )


def warn_of_compressed_model() -> None:
    """Warn that training continues on a compressed model."""
    rank_zero_warn(
        "this model is compressed already: CompressionCallback does nothing more, and further training moves the "
        "weights off their grid; to compress again, train from a dense checkpoint with a new callback"
    )


def warn_of_no_fit() -> None:
    """Warn that a model is tested which was never compressed."""
    rank_zero_warn(
        "CompressionCallback has compressed nothing: it acts at the end of trainer.fit, which was not called (perhaps "
        "because of train=False), and no checkpoint of a run with it was loaded; to compress a model as it is, fit "
        "with Trainer(max_epochs=0), on the command line trainer.max_epochs=0"
    )


def warn_of_stray_step(optimizer: Optimizer) -> None:
    """Warn of a step outside of a training batch."""
    rank_zero_warn(
        f"a {type(optimizer).__name__} stepped outside of a training batch; the step counts, but modifiers do not see "
        f"it: step it in training_step, so that they can act on it"
    )


def check_plain(value: Any, place: str) -> None:
    """TypeError for anything but primitives and tensors, which ``weights_only`` could not load from a checkpoint."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, f"a key of {place}")
            check_plain(inner, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            check_plain(inner, f"{place}[{i}]")
    elif type(value) not in (bool, int, float, str, type(None)) and not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{place} is a {type(value).__name__}, expected numbers, strings, None, lists, dicts or tensors: "
            f"anything else breaks resuming with weights_only"
        )
