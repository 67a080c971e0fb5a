"""A sharded model on the rank that exports it: parameter after parameter is gathered, quantized Linears packed at once.

What is gathered goes into a file without a name, in the folder of the export, and is mapped into memory from there:
so that rank holds its shards, and of the rest what the system has room for.
"""

import mmap
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from lightning_compress.layers.dense_keys import ORIGINAL
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.memory import release
from lightning_compress.layers.sharded import full, gathered, is_dtensor, plain_modules
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.packing import pack
from lightning_compress.quant.parametrization import fake_quantize_of, lift, lower
from lightning_compress.quant.record import Quantized

__all__ = ["gathered_on"]


@contextmanager
def gathered_on(model: nn.Module, is_owner: bool, folder: Path | None = None) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, the model of the owner is whole, and ``save`` writes it; every rank enters, the others keep their shards.

    Yields the tensors of packed Linears by name, for ``save(..., stored=...)``: their weights are on the meta device.

    Args:
        model: The model.
        is_owner: Whether this rank writes the export. Its errors are raised when all ranks have gathered everything.
        folder: A folder on the disk of the export, which exists; None: that of the system for temporary files.
    """
    with plain_modules(model), ExitStack() as stack:
        records = _packable(model)
        stored: dict[str, dict[str, Tensor]] = {}
        disk = stack.enter_context(_TensorsOnDisk(folder, _most_bytes(model))) if is_owner else None
        weights = set()
        for name, (module, record) in records.items():
            weights.add(id(_weight(module)))
            with gathered(module, write=False):
                if disk is not None:
                    stored[name] = disk.keep(partial(pack, name, module, record))
            release()
        parameters: dict[int, nn.Parameter] = {}
        for owner in model.modules():
            for local, parameter in owner._parameters.items():
                if parameter is None or not is_dtensor(parameter):
                    continue
                if id(parameter) not in parameters:
                    values = None if id(parameter) in weights else full(parameter)  # by all ranks
                    held = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    if disk is not None and values is not None:
                        held = disk.keep(partial(dict, values=values)).get("values", held)
                    parameters[id(parameter)] = nn.Parameter(held, False)
                if is_owner:
                    stack.callback(owner._parameters.__setitem__, local, parameter)
                    owner._parameters[local] = parameters[id(parameter)]
        if disk is not None and disk.failure is not None:
            raise disk.failure
        for module in model.modules() if is_owner else ():
            if fake_quantize_of(module) is not None:
                stack.callback(lower, module, lift(module), None)
        yield stored


class _TensorsOnDisk:
    """Tensors in one file that is removed when its process ends, however it ends.

    Args:
        folder: Where the file is.
        size: Bytes that it may hold at most; no room is taken before it is written to.
    """

    ALIGNMENT = 64

    def __init__(self, folder: Path | None, size: int):
        self.folder, self.size = folder, size
        self.failure: Exception | None = None
        self._stack = ExitStack()
        self._place: tuple[IO[bytes], mmap.mmap] | None = None

    def __enter__(self) -> "_TensorsOnDisk":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()  # the mapping ends with the last tensor

    def keep(self, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``work`` returns, in the file; nothing once it has failed: the other ranks go on gathering."""
        if self.failure is None:
            try:
                return {name: self._put(tensor.detach().cpu()) for name, tensor in work().items()}
            except Exception as error:
                self.failure = error
        return {}

    def _put(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        if self._place is None:
            opened = self._stack.enter_context(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115  (it is one)
            opened.truncate(self.size)
            self._place = opened, mmap.mmap(opened.fileno(), self.size)
        file, mapping = self._place
        start = -(-file.tell() // self.ALIGNMENT) * self.ALIGNMENT
        file.seek(start)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        return torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)


def _most_bytes(model: nn.Module) -> int:
    """More than the tensors of an export take: what packing adds to a weight is smaller than the weight."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return sum(2 * parameter.numel() * parameter.element_size() + 2**16 for parameter in parameters) + 1


def _packable(model: nn.Module) -> dict[str, tuple[nn.Module, Quantized]]:
    """Quantized Linears whose weight is their own."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        clean_name(name): (module, record)
        for name, (module, record) in Quantized.find(model).items()
        if isinstance(module, nn.Linear) and not isinstance(module, WeightSlice) and owners[id(_weight(module))] == 1
    }


def _weight(module: nn.Module) -> Tensor | None:
    """The parameter with the weight of a Linear."""
    return module._parameters["weight"] if "weight" in module._parameters else module.get_parameter(ORIGINAL)
