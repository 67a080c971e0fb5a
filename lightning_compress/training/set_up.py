"""Set-up of a fit: when the model is built, what INITIALIZE needs around it, and checks before the first batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import check_device
from lightning_compress.core.events import Event
from lightning_compress.core.interruption import check_uninterrupted
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.export.experts import planned_fault
from lightning_compress.export.gguf.write import check_decoder
from lightning_compress.export.onnx.expressible import check_schemes
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.layers.forward import patched
from lightning_compress.layers.split_experts import split_while
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.training.checks import check_averaging, check_whole, tensor_names
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.pruned_checkpoints import keep_main_process_dense
from lightning_compress.training.results import processors
from lightning_compress.training.sharding import check_modifiers, check_unsharded, shards, with_action
from lightning_compress.training.submodule import USUAL, choose
from lightning_compress.training.user_loss import check_training_step

__all__ = ["check_before_training", "initialize", "when_built"]


def when_built(
    pl_module: LightningModule, name: str | None, action: Callable[[], None]
) -> AbstractContextManager[None]:
    """Run ``action`` now if the model is built; else, inside of the context, in ``configure_model`` or after it.

    Lightning calls that between all setup hooks and the making of optimizers.

    Raises:
        ValueError: There is no module of that name, and no hook of the LightningModule can build it.
    """
    if _is_built(pl_module, name):
        action()
        return nullcontext()
    return patched(pl_module, configure_model=with_action(pl_module.configure_model, action))


def _is_built(pl_module: LightningModule, name: str | None) -> bool:
    """False where ``configure_model`` or ``setup`` of the LightningModule may still build the model."""
    built_later = is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)
    try:
        chosen, module = choose(pl_module, name)
    except ValueError:
        if built_later:
            return False
        raise
    certain = name is not None or chosen in USUAL
    return not built_later or (certain and next(module.parameters(), None) is not None)


def initialize(
    trainer: Trainer, pl_module: LightningModule, name: str, lifecycle: Lifecycle, state: State, event: Event
) -> None:
    """Initialize the modifiers on the model of that name; ValueError where the Trainer cannot do what they need."""
    model = state.model
    assert model is not None
    check_unsharded(model)
    check_modifiers(trainer, lifecycle.modifiers)
    if any(m.needs.gradients == "training_step" for m in lifecycle.modifiers):
        check_training_step(pl_module)
    reshaping = any(m.needs.changes_shapes for m in lifecycle.modifiers)
    if reshaping:
        keep_main_process_dense(trainer, pl_module)
    before = tensor_names(pl_module)
    with nullcontext() if lifecycle.windowed else split_while(model):
        lifecycle.initialize(state, event)
        if fault := planned_fault(model, _planned(lifecycle.modifiers)):  # plain transformers is known not to read it
            rank_zero_warn(fault)
    check_averaging(trainer, name, reshaping, tensor_names(pl_module) != before)


def check_before_training(
    trainer: Trainer, pl_module: LightningModule, state: State, options: CallbackOptions, modifiers: Sequence[Modifier]
) -> None:
    """ValueError now for what would fail after training: ``blocks``, ``offload_device``, the export."""
    model, calibration = state.model, options.calibration
    check_uninterrupted(model)
    check_whole(trainer, model)
    if calibration.blocks is not None:
        find_blocks(model, calibration.blocks)
    if "onnx" in options.formats:
        if shards(trainer):
            raise ValueError(
                "export='onnx' traces the model on one process, and ModelParallelStrategy shards it: export "
                "'compressed_tensors', then save(load(folder), 'onnx', format='onnx')"
            )
        check_schemes(_planned(modifiers))
    if "gguf" in options.formats:
        if shards(trainer):
            raise ValueError(
                "export='gguf' is written by one process, and ModelParallelStrategy shards the model: export "
                "'compressed_tensors', then lightning-compress export FOLDER --format gguf"
            )
        check_decoder(model, _planned(modifiers))
    tokenizers = processors(trainer, pl_module)
    state.team.result(lambda: rehearse(model, tokenizers), "checking what will be exported")
    check_device(calibration)


def _planned(modifiers: Sequence[Modifier]) -> dict[str, Any]:
    """The scheme of each module that the quantizers of a recipe will quantize."""
    schemes: dict[str, Any] = {}
    for modifier in modifiers:
        if isinstance(modifier, QuantizationArguments):
            schemes |= modifier.planned
    return schemes
