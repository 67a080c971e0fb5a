"""Replace Linears of a model by packed ones, and put Linears in their place while a checkpoint is written."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.quant.packed.backends import ProductCall
from lightning_compress.quant.packed.layout import fault_of
from lightning_compress.quant.packed.linear import PackedLinear
from lightning_compress.quant.packing import unpack
from lightning_compress.quant.record import Quantized

__all__ = ["Packing", "PackingChoice", "as_linears", "is_packable", "pack_linears", "unpacked"]


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


def pack_linears(model: nn.Module, *, served: bool = False) -> Packing:
    """Replace, in place, Linears that carry a record by their packed forms.

    Those that share their weight with another module stay dense.

    Args:
        model: Any module.
        served: Leave those dense for which the device has no backend (backends.py), such as float32 tokens times
            4-bit weights on a CPU: they would compute with a dense copy beside the packed weight.
    """
    choice = PackingChoice(model, served)
    for name, (module, record) in Quantized.find(model).items():
        weight = module.get_parameter("weight") if type(module) is nn.Linear else None
        kind = ("", torch.float32) if weight is None else (weight.device.type, weight.dtype)
        make = partial(PackedLinear.from_quantized, module, name)
        if (packed := choice.packed(name, module, record.scheme, make, *kind)) is not None:
            model.set_submodule(name, packed)
    return choice.result()


class PackingChoice:
    """Chooses the quantized Linears of a model that are packed.

    Args:
        model: Any module; it may be on the meta device.
        served: As in :func:`pack_linears`.
        fastest: Leave those dense that are faster so for any number of tokens (dispatch.py); their names are in
            ``unrounded`` where the scheme has dynamic inputs, which are not to be rounded then.
    """

    def __init__(self, model: nn.Module, served: bool, fastest: bool = False):
        self.served, self.fastest = served, fastest
        self.unrounded: list[str] = []
        self._owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self._names: list[str] = []
        self._dense: dict[str, str] = {}
        self._faster = Counter[torch.dtype]()

    def packed(
        self,
        name: str,
        module: nn.Module,
        scheme: QuantizationScheme,
        make: Callable[[], PackedLinear],
        device: str,
        dtype: torch.dtype,
    ) -> PackedLinear | None:
        """What ``make`` gives for a quantized module, or None if it stays dense.

        Args:
            name: Its name.
            module: The module.
            scheme: Its scheme.
            make: Makes its packed form, of which only shapes are looked at; not called if it stays dense anyway.
            device: Type of the device on which it will compute.
            dtype: That of its inputs.
        """
        if not name or type(module) is not nn.Linear or fault_of(scheme) is not None:
            self._dense[name] = "only Linears inside of a model are packed"
            return None
        if self._owners[id(module.get_parameter("weight"))] > 1:
            self._dense[name] = "their weight is shared"
            return None
        packed, call = make(), ProductCall(device, dtype, 3, False)
        if self.fastest and self._is_best_dense(packed, call):
            self._dense[name] = "a dense product is faster"
            self.unrounded += [name] if scheme.input_activations is not None else []
            return None
        if not self.served or packed.backend(call) is not None:
            self._names.append(name)
            return packed
        self._dense[name] = f"this {device} has no packed product in {str(dtype).removeprefix('torch.')}"
        if packed.backend(call._replace(dtype=torch.bfloat16)) is not None:
            self._faster[torch.bfloat16] += 1
        return None

    def _is_best_dense(self, packed: PackedLinear, call: ProductCall) -> bool:
        """A static grid clips its inputs, which a packed Linear does in either case."""
        inputs = packed.scheme.input_activations
        dynamic = inputs is None or inputs.dynamic is True
        return dynamic and packed.backend(call) is not None and not packed.is_ever_packed(call)

    def result(self) -> Packing:
        """What was chosen so far."""
        return Packing(tuple(self._names), self._dense, self._faster)


def is_packable(module: nn.Module) -> bool:
    """True for a quantized Linear whose scheme a PackedLinear holds, and whose rows and columns its format takes."""
    record = Quantized.of(module)
    return type(module) is nn.Linear and record is not None and fault_of(record.scheme) is None


@contextmanager
def as_linears(model: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, each PackedLinear is a Linear on meta with a record; yields their tensors, on the CPU, by name."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    try:
        for name, module in packed.items():
            model.set_submodule(name, _stand_in(module))
        yield {
            name: {local: tensor.cpu() for local, tensor in module.tensors().items()} for name, module in packed.items()
        }
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, each PackedLinear is a Linear with a weight and a record."""
    with as_linears(model) as stored:
        for name, tensors in stored.items():
            linear = model.get_submodule(name)
            record = Quantized.of(linear)
            assert record is not None
            weight, record = unpack(dict(tensors), nn.Linear, record.scheme)
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            record.attach(linear)
        yield


def _stand_in(packed: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False, dtype=packed.dtype)
    linear.register_parameter("bias", packed.bias)
    Quantized(packed.scheme, packed.stored("weight_scale")).attach(linear)
    return linear
