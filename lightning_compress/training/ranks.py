"""Several processes at the end of training: where they add up, and what spawned workers cannot send back."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_compress.distributed import world_size
from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized
from lightning_compress.training.broadcast import ties

__all__ = ["beside_weights", "spawns_workers", "summing_device", "warn_of_workers"]


def summing_device(trainer: Trainer) -> torch.device:
    """Device on which ranks add up; a single process uses the CPU, since MPS has no float64."""
    return trainer.strategy.root_device if world_size() > 1 else torch.device("cpu")


def beside_weights(model: nn.Module) -> list[str]:
    """What belongs to the compressed model and is not in its weights."""
    schemes = [record.scheme for _, record in Quantized.find(model).values()]
    present = {
        "the quantization of activations": any(scheme.input_activations is not None for scheme in schemes),
        "the quantization of the KV cache": bool(QuantizedCache.find(model)),
        "the rotations that run beside modules": bool(OnlineRotations.find(model)),
    }
    return [name for name, is_present in present.items() if is_present]


def spawns_workers(trainer: Trainer) -> bool:
    """Whether workers train in processes of their own and send weights back to the main process, and nothing else."""
    return any(c.__name__ == "_MultiProcessingLauncher" for c in type(trainer.strategy.launcher).__mro__)


def warn_of_workers(trainer: Trainer, model: nn.Module, ties_before: int) -> None:
    """Name what the main process does not get back from spawned workers; ``ties_before`` is :func:`ties` before."""
    if not spawns_workers(trainer):
        return
    missing = beside_weights(model)
    if ties(model) < ties_before:
        missing.append("that weights were untied (both get the values of one)")
    if missing:
        rank_zero_warn(
            f"the main process gets the compressed weights back from its workers, but not {', nor '.join(missing)}; "
            f"what is exported has all: load(folder, model) before testing"
        )
