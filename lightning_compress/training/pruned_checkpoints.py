"""Checkpoints of a model whose tensors shrank during training: a record of the cuts is stored with the weights.

Lightning loads weights before it gives callbacks their state, and a freshly built model is dense. The LightningModule's
``on_load_checkpoint`` comes before both, so the cuts are repeated there, when fit resumes and when validate, test or
predict load a checkpoint; ``on_save_checkpoint`` comes for checkpoints of weights alone, too.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.layers.forward import patched
from lightning_compress.structure.surgery import record_of, reshape
from lightning_compress.training.broadcast import spawns_workers
from lightning_compress.training.hyperparameters import write_plain_modules
from lightning_compress.training.submodule import choose

__all__ = ["carry_shapes", "keep_main_process_dense", "read_shapes", "same_shapes", "write_shapes"]

KEY = "lightning_compress_structure"


def write_shapes(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Put the record of the cuts into ``model`` into its checkpoint; nothing where there are none."""
    if steps := record_of(model):
        checkpoint[KEY] = steps


def read_shapes(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Give ``model`` the shapes of the checkpoint; ValueError when it has smaller ones already, or other ones."""
    steps, present = checkpoint.get(KEY, []), record_of(model)
    if len(steps) < len(present):
        raise ValueError(
            f"this checkpoint was saved when {len(steps)} of the {len(present)} cuts into the model had been made, and "
            f"tensors that were cut cannot grow again: load it into a newly built model, with a new CompressionCallback"
        )
    reshape(model, steps)


def same_shapes(weights: Mapping[str, Any], root: nn.Module) -> bool:
    """Whether no tensor of a state dict has another shape in ``root``, and no weight is there that ``root`` lacks."""
    present = root.state_dict()
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    return all(key in present and present[key].shape == value.shape for key, value in tensors.items())


def keep_main_process_dense(trainer: Trainer, root: LightningModule) -> None:
    """Workers that are spawned or forked send no weights of another shape to the main process, where loading fails."""
    if not spawns_workers(trainer):
        return

    def drop_all(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if trainer.state.finished and any(record_of(m) for m in module.modules()):
            state.clear()

    root.register_state_dict_post_hook(drop_all)


def carry_shapes(root: LightningModule, name: str | None) -> AbstractContextManager[None]:
    """Inside, the checkpoint hooks of ``root`` write and read shapes, before its own; ``name`` as in :func:`choose`."""
    load, save = root.on_load_checkpoint, root.on_save_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        read_shapes(checkpoint, choose(root, name)[1])
        load(checkpoint)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        write_shapes(checkpoint, choose(root, name)[1])
        write_plain_modules(checkpoint)
        save(checkpoint)

    return patched(root, on_load_checkpoint=on_load_checkpoint, on_save_checkpoint=on_save_checkpoint)
