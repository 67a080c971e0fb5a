"""Compression for any model that a PyTorch Lightning Trainer trains.

    Trainer(callbacks=[CompressionCallback(GPTQModifier(scheme="W4A16"))])

Public names, imported when they are first used: ``import lightning_compress`` itself imports nothing.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callback import CompressionCallback
    from lightning_compress.core.events import EventType
    from lightning_compress.core.factory import ModifierFactory
    from lightning_compress.core.modifier import Modifier
    from lightning_compress.export.compressed_tensors import load, save
    from lightning_compress.modifiers.autoround.modifier import AutoRoundModifier
    from lightning_compress.modifiers.batch_norm import FoldBatchNormModifier
    from lightning_compress.modifiers.constant import ConstantPruningModifier
    from lightning_compress.modifiers.depth import DepthPruningModifier
    from lightning_compress.modifiers.distillation.modifier import DistillationModifier
    from lightning_compress.modifiers.freeze import FreezeModifier
    from lightning_compress.modifiers.gptq.modifier import GPTQModifier
    from lightning_compress.modifiers.kv_cache import KVCacheModifier
    from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier
    from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
    from lightning_compress.modifiers.movement import MovementPruningModifier
    from lightning_compress.modifiers.qat import QATModifier
    from lightning_compress.modifiers.quantization import QuantizationModifier
    from lightning_compress.modifiers.reap import REAPModifier, REAPPruningModifier
    from lightning_compress.modifiers.rotation.modifier import QuIPModifier, RotationModifier, SpinQuantModifier
    from lightning_compress.modifiers.smoothing.awq import AWQModifier
    from lightning_compress.modifiers.smoothing.logarithmic_equalization import LogarithmicEqualizationModifier
    from lightning_compress.modifiers.smoothing.smoothquant import SmoothQuantModifier
    from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
    from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
    from lightning_compress.modifiers.wanda.modifier import WandaPruningModifier
    from lightning_compress.oneshot import compress
    from lightning_compress.quant.packed import dequantize

__version__ = "0.1.0"

__all__ = [
    "AWQModifier",
    "AutoRoundModifier",
    "CompressionCallback",
    "ConstantPruningModifier",
    "DepthPruningModifier",
    "DistillationModifier",
    "EventType",
    "FoldBatchNormModifier",
    "FreezeModifier",
    "GPTQModifier",
    "KVCacheModifier",
    "LearnedMaskModifier",
    "LogarithmicEqualizationModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "ModifierFactory",
    "MovementPruningModifier",
    "QATModifier",
    "QuIPModifier",
    "QuantizationModifier",
    "REAPModifier",
    "REAPPruningModifier",
    "RotationModifier",
    "SmoothQuantModifier",
    "SparseGPTModifier",
    "SpinQuantModifier",
    "StructuredPruningModifier",
    "WandaPruningModifier",
    "compress",
    "dequantize",
    "load",
    "save",
]

_HOME = MappingProxyType(
    {
        "AWQModifier": "modifiers.smoothing.awq",
        "AutoRoundModifier": "modifiers.autoround.modifier",
        "CompressionCallback": "callback",
        "ConstantPruningModifier": "modifiers.constant",
        "DepthPruningModifier": "modifiers.depth",
        "DistillationModifier": "modifiers.distillation.modifier",
        "EventType": "core.events",
        "FoldBatchNormModifier": "modifiers.batch_norm",
        "FreezeModifier": "modifiers.freeze",
        "GPTQModifier": "modifiers.gptq.modifier",
        "KVCacheModifier": "modifiers.kv_cache",
        "LearnedMaskModifier": "modifiers.learned_mask.modifier",
        "LogarithmicEqualizationModifier": "modifiers.smoothing.logarithmic_equalization",
        "MagnitudePruningModifier": "modifiers.magnitude",
        "Modifier": "core.modifier",
        "ModifierFactory": "core.factory",
        "MovementPruningModifier": "modifiers.movement",
        "QATModifier": "modifiers.qat",
        "QuIPModifier": "modifiers.rotation.modifier",
        "QuantizationModifier": "modifiers.quantization",
        "REAPModifier": "modifiers.reap",
        "REAPPruningModifier": "modifiers.reap",
        "RotationModifier": "modifiers.rotation.modifier",
        "SmoothQuantModifier": "modifiers.smoothing.smoothquant",
        "SparseGPTModifier": "modifiers.sparsegpt",
        "SpinQuantModifier": "modifiers.rotation.modifier",
        "StructuredPruningModifier": "modifiers.structured.modifier",
        "WandaPruningModifier": "modifiers.wanda.modifier",
        "compress": "oneshot",
        "dequantize": "quant.packed",
        "load": "export.compressed_tensors",
        "save": "export.compressed_tensors",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
