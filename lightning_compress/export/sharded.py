"""A sharded model on the rank that exports it: parameter after parameter is gathered, quantized Linears packed at once.

So that rank holds its shards, the packed weights, and whole those weights alone that are exported dense.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_compress.layers.dense_keys import ORIGINAL
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.sharded import full, gathered, is_dtensor, plain_modules
from lightning_compress.quant.packing import pack
from lightning_compress.quant.parametrization import fake_quantize_of, lift, lower
from lightning_compress.quant.record import Quantized

__all__ = ["gathered_on"]


@contextmanager
def gathered_on(model: nn.Module, is_owner: bool) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, the model of the owner is whole, and ``save`` writes it; every rank enters, the others keep their shards.

    Yields the tensors of packed Linears by name, for ``save(..., stored=...)``: their weights are on the meta device.
    """
    with plain_modules(model), ExitStack() as stack:
        records = _packable(model)
        stored: dict[str, dict[str, Tensor]] = {}
        weights = set()
        for name, (module, record) in records.items():
            weights.add(id(_weight(module)))
            with gathered(module, write=False):
                if is_owner:
                    stored[name] = pack(name, module, record)
        parameters: dict[int, nn.Parameter] = {}
        for owner in model.modules():
            for local, parameter in owner._parameters.items():
                if parameter is None or not is_dtensor(parameter):
                    continue
                if id(parameter) not in parameters:
                    values = None if id(parameter) in weights else full(parameter)  # by all ranks
                    held = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    if is_owner and values is not None:
                        held = values.cpu()
                    parameters[id(parameter)] = nn.Parameter(held, False)
                if is_owner:
                    stack.callback(owner._parameters.__setitem__, local, parameter)
                    owner._parameters[local] = parameters[id(parameter)]
        for module in model.modules() if is_owner else ():
            if fake_quantize_of(module) is not None:
                stack.callback(lower, module, lift(module), None)
        yield stored


def _packable(model: nn.Module) -> dict[str, tuple[nn.Module, Quantized]]:
    """Quantized Linears whose weight is their own."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        clean_name(name): (module, record)
        for name, (module, record) in Quantized.find(model).items()
        if isinstance(module, nn.Linear) and not isinstance(module, ExpertLinear) and owners[id(_weight(module))] == 1
    }


def _weight(module: nn.Module) -> Tensor | None:
    """The parameter with the weight of a Linear."""
    return module._parameters["weight"] if "weight" in module._parameters else module.get_parameter(ORIGINAL)
