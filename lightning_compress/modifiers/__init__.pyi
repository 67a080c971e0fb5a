"""Every modifier, for type checkers and editors. Written by scripts/modifier_stub.py; do not edit."""

from lightning_compress.core.factory import ModifierFactory
from lightning_compress.core.modifier import Modifier, ModifierInterface
from lightning_compress.modifiers.allocate.modifier import AllocateModifier
from lightning_compress.modifiers.autoround.modifier import AutoRoundModifier
from lightning_compress.modifiers.batch_norm import FoldBatchNormModifier
from lightning_compress.modifiers.constant import ConstantPruningModifier
from lightning_compress.modifiers.depth import DepthPruningModifier
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from lightning_compress.modifiers.freeze import FreezeModifier
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier
from lightning_compress.modifiers.lora import LoRAModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.movement import MovementPruningModifier
from lightning_compress.modifiers.qat import QATModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.modifiers.reap import REAPModifier, REAPPruningModifier
from lightning_compress.modifiers.rotation.block_hadamard import BlockHadamardModifier
from lightning_compress.modifiers.rotation.modifier import QuIPModifier, RotationModifier, SpinQuantModifier
from lightning_compress.modifiers.smoothing.awq import AWQModifier
from lightning_compress.modifiers.smoothing.logarithmic_equalization import LogarithmicEqualizationModifier
from lightning_compress.modifiers.smoothing.smoothquant import SmoothQuantModifier
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from lightning_compress.modifiers.tune.modifier import TuneModifier
from lightning_compress.modifiers.wanda.modifier import WandaPruningModifier

__all__ = [
    "AWQModifier",
    "AllocateModifier",
    "AutoRoundModifier",
    "BlockHadamardModifier",
    "ConstantPruningModifier",
    "DepthPruningModifier",
    "DistillationModifier",
    "FoldBatchNormModifier",
    "FreezeModifier",
    "GPTQModifier",
    "KVCacheModifier",
    "LearnedMaskModifier",
    "LoRAModifier",
    "LogarithmicEqualizationModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "ModifierFactory",
    "ModifierInterface",
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
    "TuneModifier",
    "WandaPruningModifier",
]
