"""Replace Linears of a model by packed ones, and put Linears in their place while a checkpoint is written."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.quant.packed.backends import ProductCall
from lightning_compress.quant.packed.layout import fault_of
from lightning_compress.quant.packed.linear import PackedLinear
from lightning_compress.quant.record import Quantized

__all__ = ["Packing", "as_linears", "is_packable", "pack_linears"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """What :func:`pack_linears` did."""

    names: tuple[str, ...]  # modules that were packed
    dense: Mapping[str, str]  # quantized modules that stay dense, and why
    faster: Mapping[torch.dtype, int]  # how many of the dense ones would be packed if the model had that dtype

    def __str__(self) -> str:
        """Such as ``packed 0 of 210 quantized modules; 210 stay dense: this cpu has no packed product in float32``."""
        reasons = Counter(self.dense.values())
        why = ", ".join(f"{count} stay dense: {reason}" for reason, count in reasons.items())
        return f"packed {len(self.names)} of {len(self.names) + len(self.dense)} quantized modules{why and '; '}{why}"


def pack_linears(model: nn.Module, stored: Mapping[str, Tensors] | None = None, *, served: bool = False) -> Packing:
    """Replace, in place, Linears that carry a record by their packed forms.

    Those that share their weight with another module stay dense.

    Args:
        model: Any module.
        stored: Tensors of the checkpoint by name of the module; modules without any are packed from their weight.
        served: Leave those dense for which the device has no backend (backends.py), such as float32 tokens times
            4-bit weights on a CPU: they would compute with a dense copy beside the packed weight.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    names, dense, faster = [], {}, Counter[torch.dtype]()
    for name, (module, _) in Quantized.find(model).items():
        if not name or not is_packable(module):
            dense[name] = "only Linears inside of a model are packed"
        elif owners[id(module.get_parameter("weight"))] > 1:
            dense[name] = "their weight is shared"
        else:
            packed, weight = _packed(name, module, stored or {}), module.get_parameter("weight")
            call = ProductCall(weight.device.type, weight.dtype, 3, False)
            if not served or packed.backend(call) is not None:
                model.set_submodule(name, packed)
                names.append(name)
                continue
            kind = str(weight.dtype).removeprefix("torch.")
            dense[name] = f"this {weight.device.type} has no packed product in {kind}"
            if packed.backend(call._replace(dtype=torch.bfloat16)) is not None:
                faster[torch.bfloat16] += 1
    return Packing(tuple(names), dense, faster)


def is_packable(module: nn.Module) -> bool:
    """True for a quantized Linear whose scheme a PackedLinear holds, and whose rows and columns its format takes."""
    record = Quantized.of(module)
    return type(module) is nn.Linear and record is not None and fault_of(record.scheme) is None


def _packed(name: str, module: nn.Module, stored: Mapping[str, Tensors]) -> PackedLinear:
    record = Quantized.of(module)
    if name not in stored or record is None:
        return PackedLinear.from_quantized(module, name)
    bias, weight = getattr(module, "bias", None), module.get_parameter("weight")
    tensors = {key: value.to(weight.device) for key, value in stored[name].items()}
    return PackedLinear(tensors, record.scheme, bias, weight.dtype).train(module.training)


@contextmanager
def as_linears(model: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, each PackedLinear is a Linear on the meta device that carries a record; yields their tensors by name."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    try:
        for name, module in packed.items():
            model.set_submodule(name, _stand_in(module))
        yield {name: module.tensors() for name, module in packed.items()}
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)


def _stand_in(packed: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False)
    linear.register_parameter("bias", packed.bias)
    Quantized(packed.scheme, packed.stored("weight_scale")).attach(linear)
    return linear
