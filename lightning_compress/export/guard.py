"""``model.save_pretrained`` of a compressed model: refused where the folder would answer otherwise than the model.

It writes packed weights without a ``quantization_config``, so that ``from_pretrained`` reads codes as weights, and
leaves out the quantization of inputs and of the KV cache. Where only weights are quantized it writes them dense, on
their grid, and that is right.
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
    """Let ``save_pretrained`` of a model, and of its parts, look at what would be lost, each time it is called."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            vars(module)["save_pretrained"] = MethodType(save_pretrained, module)


# Its name is that of the method: a pickled model, whose bound methods pickle by name, then gets back the class's own.
def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    if lost := _lost(self):
        raise ValueError(
            f"save_pretrained would lose {lost}, and from_pretrained would load a {type(self).__name__} that answers "
            f"otherwise; call lightning_compress.save(model, folder)"
        )
    return type(self).save_pretrained(self, *args, **kwargs)


def _lost(model: nn.Module) -> str:
    """What ``save_pretrained`` has no place for; empty where the folder would be right."""
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
