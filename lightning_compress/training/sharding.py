"""Models that Lightning's ModelParallelStrategy shards: FSDP2 (``fully_shard``), tensor parallelism, or both.

Modifiers are initialized on whole parameters: masks, parametrizations and scales are there when ``configure_model``
shards the model. Then each rank holds shards (layers/sharded.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.residence import Residence, Sharded
from lightning_compress.core.modifier import Modifier
from lightning_compress.layers.sharded import gathered, is_sharded, plain_modules, reshard

__all__ = ["before_sharding", "block_by_block", "check_modifiers", "check_unsharded", "reshard_between", "shards",
           "with_action"]  # fmt: skip

_ACT = "lightning_compress_before_sharding"


def with_action(configure_model: Callable[[], None], action: Callable[[], None]) -> Callable[[], None]:
    """``configure_model`` that also calls ``action``, once: in :func:`before_sharding`, else when it has returned."""
    actions = [action]

    def act() -> None:
        getattr(configure_model, _ACT, lambda: None)()  # of another callback, which comes first
        if actions:
            actions.pop()()

    def configured() -> None:  # Lightning asks for a function, not for an object that can be called
        configure_model()
        act()

    setattr(configured, _ACT, act)
    return configured


def before_sharding(pl_module: LightningModule) -> None:
    """Initialize the modifiers of ``CompressionCallback`` now: a line of ``configure_model``, before sharding.

    ::

        def configure_model(self):
            if self.model is None:
                self.model = build()
                before_sharding(self)
                for block in self.model.layers:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    Outside of ``trainer.fit``, and without the callback, it does nothing.

    Args:
        pl_module: The LightningModule, with its model built.
    """
    getattr(vars(pl_module).get("configure_model"), _ACT, lambda: None)()


def shards(trainer: Trainer) -> bool:
    """Whether the strategy is one that shards models here."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_modifiers(trainer: Trainer, modifiers: Sequence[Modifier]) -> None:
    """ValueError names a modifier that cannot work on shards, and the reason."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    columns = strategy.device_mesh["tensor_parallel"].size()
    for modifier in modifiers:
        if reason := _obstacle(modifier, columns, strategy._save_distributed_checkpoint):
            raise ValueError(
                f"{modifier.name} cannot work on a model that {type(strategy).__name__} shards: {reason}; or train "
                f"with strategy='ddp', or compress the consolidated checkpoint afterwards, with compress()"
            )


def _obstacle(modifier: Modifier, columns: int, saves_shards: bool) -> str:
    """Why a modifier cannot work on shards; empty where it can."""
    needs = modifier.needs
    if needs.changes_shapes:
        return "it changes shapes of parameters, and shards keep theirs; leave it out"
    if needs.hand_over:
        return f"with start={modifier.start} it calibrates during training; leave start out"
    if isinstance(needs.sharded, str):
        return needs.sharded
    if not needs.sharded:
        return "it needs whole weights (its Needs do not say sharded=True); leave it out"
    if needs.parametrizes and columns > 1:
        return (
            f"it parametrizes weights, which parallelize_module cannot split (tensor_parallel_size={columns}); use "
            f"tensor_parallel_size=1"
        )
    if needs.parametrizes and not saves_shards:
        return (
            "it parametrizes weights, and Lightning cannot load those from one file (save_distributed_checkpoint="
            "False); leave that argument out"
        )
    return ""


def check_unsharded(model: nn.Module) -> None:
    """ValueError where INITIALIZE would meet DTensors."""
    if is_sharded(model):
        name = next(name for name, parameter in model.named_parameters() if hasattr(parameter, "device_mesh"))
        raise ValueError(
            f"{name!r} is sharded (a DTensor) before the modifiers were initialized, and these need whole weights "
            f"there: call lightning_compress.before_sharding(self) in configure_model, after the model is built and "
            f"before fully_shard or parallelize_module"
        )


@contextmanager
def block_by_block(
    trainer: Trainer, pl_module: LightningModule, model: nn.Module, options: CalibrationOptions
) -> Iterator[Residence | None]:
    """Inside, ``calibrate`` can walk a sharded model with the residence that this yields; None for any other model."""
    if not shards(trainer):
        yield None
        return
    with plain_modules(pl_module):
        blocks = {} if options.walk == "whole" else find_blocks(model, options.blocks)
        with gathered(pl_module, without=blocks.values()):
            yield Sharded()


def reshard_between(trainer: Trainer, model: nn.Module | None) -> None:
    """Before modifiers act: free the full weights that validation leaves in the outermost modules."""
    if model is not None and shards(trainer):
        reshard(model)
