"""``model.save_pretrained`` of a compressed model: refused where the folder would give other outputs than the model.

It writes packed weights without a ``quantization_config``, so that ``from_pretrained`` reads codes as weights, and
leaves out the quantization of inputs and of the KV cache. Where only weights are quantized it writes them dense, on
their grid, which is correct.
"""

from types import MethodType
from typing import Any

from torch import nn

from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.packed import PackedLinear
from lightning_compress.quant.record import Quantized

__all__ = ["guard_save_pretrained"]


def guard_save_pretrained(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model, and of its submodules, check first what would be lost."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            vars(module)["save_pretrained"] = MethodType(save_pretrained, module)


# It has the name of the method: in a pickled model bound methods are pickled by name, and become those of the class.
def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    if lost := _lost(self):
        raise ValueError(
            f"save_pretrained would lose {lost}, and from_pretrained would load a {type(self).__name__} with other "
            f"outputs; call lightning_compress.save(model, folder)"
        )
    return type(self).save_pretrained(self, *args, **kwargs)


def _lost(model: nn.Module) -> str:
    """What ``save_pretrained`` would lose; empty where the folder would be correct."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    records = Quantized.find(model).items()
    inputs = [name for name, (_, record) in records if record.scheme.input_activations is not None]
    kinds = {
        "how packed weights are read": packed,
        "the quantization of inputs": inputs,
        "the quantization of the KV cache": list(QuantizedCache.find(model)),
        "rotations that run beside modules": list(OnlineRotations.find(model)),
    }
    return ", ".join(f"{kind} ({len(names)} modules, such as {names[0]})" for kind, names in kinds.items() if names)
