"""What a Trainer and a recipe cannot do together, said before hours of training."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.core.events import Event
from lightning_compress.core.modifier import Modifier

__all__ = [
    "averages",
    "check_averaging",
    "check_lightning",
    "check_order",
    "check_plain",
    "check_strategy",
    "check_whole",
    "check_windows",
    "tensor_bytes",
    "tensor_names",
]

TRUE_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def averages(callback: Callback) -> bool:
    """True for Lightning's averages of weights (EMA, SWA), and for what inherits from them."""
    return any(c.__name__ in AVERAGING for c in type(callback).__mro__)


def tensor_names(module: nn.Module) -> list[str]:
    """Names of parameters and buffers, in the order in which averaging pairs them."""
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def tensor_bytes(module: nn.Module, precision: str | None = None) -> int:
    """Bytes of all parameters and buffers; those of lazy modules are not known yet and count as 0.

    Args:
        module: The model.
        precision: The Trainer's, where the model is not yet in it: ``bf16-true`` is given to it after ``setup``.
    """
    dtype = TRUE_DTYPES.get(precision or "")
    tensors = (*module.parameters(), *module.buffers())
    return sum(
        t.numel() * (dtype.itemsize if dtype is not None and t.is_floating_point() else t.element_size())
        for t in tensors
        if not is_lazy(t)
    )


def check_lightning(trainer: Any, pl_module: Any) -> None:
    """Both are those of ``lightning.pytorch``: pytorch_lightning has classes of its own under the same names."""
    for given, expected in ((trainer, Trainer), (pl_module, LightningModule)):
        if not isinstance(given, expected):
            raise ValueError(
                f"{type(given).__name__} is a {expected.__name__} of pytorch_lightning, expected one of "
                f"lightning.pytorch, which is the same under another name: write import lightning.pytorch as pl (or "
                f"from lightning.pytorch import {expected.__name__}) in place of import pytorch_lightning as pl"
            )


def check_strategy(trainer: Trainer) -> None:
    """No strategy that shards weights."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} shards the weights, and compression needs them whole: use "
            f"strategy='ddp' or one device, or compress the consolidated checkpoint afterwards, with compress()"
        )


def check_whole(module: nn.Module) -> None:
    """``fully_shard`` in configure_model works under any strategy; its parameters are DTensors."""
    sharded = [name for name, parameter in module.named_parameters() if hasattr(parameter, "device_mesh")]
    if sharded:
        raise ValueError(
            f"{sharded[0]!r} is sharded (a DTensor), and compression needs whole weights: train without fully_shard, "
            f"or compress the consolidated checkpoint afterwards, with compress()"
        )


def check_order(trainer: Trainer, callback: Callback) -> None:
    """At the end of training, averaging overwrites the weights: what it must not overwrite has to come after it."""
    after = trainer.callbacks[trainer.callbacks.index(callback) + 1 :]
    for other in after:
        if averages(other):
            name = type(other).__name__
            raise ValueError(
                f"{name} is listed after CompressionCallback and would overwrite the compressed weights with its "
                f"average: list it first, Trainer(callbacks=[{name}(...), CompressionCallback(...)])"
            )


def check_averaging(trainer: Trainer, module: str, reshaping: bool, added: bool) -> None:
    """Averages pair tensors by position, so a recipe may neither add tensors nor change their shapes.

    Args:
        trainer: For its callbacks.
        module: Name of the model.
        reshaping: A modifier changes shapes.
        added: A modifier has added parameters or buffers.
    """
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
    """A window in epochs or fractions needs a length that is known and constant; none should outlast the run."""
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


def check_plain(value: Any, place: str) -> None:
    """Primitives and tensors only, or TypeError: what else a checkpoint held, ``weights_only`` could not read back."""
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
