"""Where the blocks of a model live, and how they come into memory, or to the accelerator, and leave again.

A residence answers the two requests of the walk: :meth:`Residence.visit` is the turn of a block, in which it changes,
and in :meth:`Residence.passing` the model runs through blocks that do not change.

    in memory   blocks are moved to the accelerator, where one is given, and back
    on disk     a block is on the meta device; its tensors are read for each visit, and released after it
    sharded     ranks hold shards of a block; all gather it for each visit, and keep their shards of the result
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_compress.calibration.activations import device_of, tree_move
from lightning_compress.calibration.capture import is_stubbed
from lightning_compress.calibration.plan import CalibrationPlan
from lightning_compress.layers.blank import blank_of
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.records import records_of
from lightning_compress.layers.sharded import gathered

__all__ = ["InMemory", "OnDisk", "Residence", "Sharded", "exact_device", "fill"]


class Residence(Protocol):
    """Where blocks live."""

    def visit(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """Inside, it is the turn of a block: its tensors are in memory, on the device; the empty name is the model."""
        ...

    def passing(self, blocks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Inside, the model runs through these blocks, one call at a time."""
        ...

    def outside(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """From now on the modules outside of blocks are in memory."""
        ...

    def check(self, plan: CalibrationPlan, unseen: Sequence[str]) -> None:
        """ValueError where blocks cannot come as the plan needs them; ``unseen`` targets get no data in their turn."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The model is in memory; each block is moved to ``device`` for its turn. None: it is not moved."""

    device: torch.device | None = None

    def visit(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        return on_device(block, self.device)

    def passing(self, blocks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        return streamed(blocks, self.device)

    def outside(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """They are."""

    def check(self, plan: CalibrationPlan, unseen: Sequence[str]) -> None:
        """Blocks in memory come whenever they are needed."""


@dataclass(frozen=True)
class OnDisk:
    """Blocks are on the meta device but for their turns; other modules are read when they are first needed, and stay.

    Each block is read once for the probe and once for its turn.

    Args:
        read: Reads a tensor by its name in the model.
        device: Device for the turn of a block.
        elsewhere: Names of blocks that another process compresses, which are not read here; the empty name stands for
            the modules outside of blocks.
    """

    read: Callable[[str], Tensor]
    device: torch.device | None = None
    elsewhere: Container[str] = ()

    @contextmanager
    def visit(self, name: str, block: nn.Module) -> Iterator[None]:
        if not name:
            raise ValueError(
                "the model is walked as a whole, and it is larger than memory; name its blocks with blocks=[...], or "
                "compress it in memory"
            )
        if name in self.elsewhere:
            yield
            return
        with self._filled(name, block):
            _check_finite([f"{name}.{local}" for local in nonfinite(block)])
            yield

    def passing(self, blocks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        return _present_while_called(blocks, self._filled, self.device)

    def outside(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        if "" in self.elsewhere:
            return
        fill(model, "", self.read, {module for block in blocks.values() for module in block.modules()})
        _check_finite(nonfinite(model))

    def check(self, plan: CalibrationPlan, unseen: Sequence[str]) -> None:
        advice = "compress this model in memory, with lightning_compress.compress"
        if len(plan.segments) > 1 or plan.uncalled or not plan.stub_last:
            raise ValueError(
                f"the blocks of this model are not one chain of {len(plan.blocks)} blocks, so that a block would be "
                f"needed again after its turn; {advice}"
            )
        inside = [name for name in unseen if any(name.startswith(f"{block}.") for block in plan.blocks)]
        if inside:
            raise ValueError(
                f"the first batch does not reach {', '.join(inside[:5])}, and whether later batches do would be known "
                f"only when the weights are on the disk; add them to ignore, or {advice}"
            )

    @contextmanager
    def _filled(self, name: str, block: nn.Module) -> Iterator[None]:
        try:
            fill(block, f"{name}.", self.read)
            with on_device(block, self.device):
                yield
        finally:
            _release(block)


@dataclass(frozen=True)
class Sharded:
    """Each rank holds shards of the blocks (DTensors); modules outside of blocks are whole.

    Each visit gathers a block on all ranks, so all ranks walk together, with the same batches.
    """

    def visit(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        return gathered(block)

    def passing(self, blocks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        return _present_while_called(blocks, lambda _name, block: gathered(block, write=False), None)

    def outside(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """They are: the caller has gathered them, and writes them back."""

    def check(self, plan: CalibrationPlan, unseen: Sequence[str]) -> None:
        """Blocks are gathered whenever they are needed."""


@contextmanager
def _present_while_called(
    blocks: Mapping[str, nn.Module],
    present: Callable[[str, nn.Module], AbstractContextManager[None]],
    device: torch.device | None,
) -> Iterator[None]:
    """Inside, every call of a block, but of one that is stubbed, runs inside of ``present(name, block)``."""
    visits: dict[nn.Module, ExitStack] = {}

    def come(name: str, block: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_stubbed(block):
            return None
        visits[block] = stack = ExitStack()
        stack.enter_context(present(name, block))
        return tree_move((args, kwargs), device)

    def leave(block: nn.Module, _args: Any, output: Any) -> Any:
        if block not in visits:
            return None
        visits.pop(block).close()
        return tree_move(output, None if device is None else torch.device("cpu"))

    with ExitStack() as hooks:
        try:
            for name, block in blocks.items():
                handle = block.register_forward_pre_hook(
                    lambda module, args, kwargs, n=name: come(n, module, args, kwargs), with_kwargs=True
                )
                hooks.callback(handle.remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            yield
        finally:
            for stack in visits.values():  # a run that was stopped inside a block
                stack.close()


def fill(module: nn.Module, prefix: str, read: Callable[[str], Tensor], leave_out: Container[nn.Module] = ()) -> None:
    """Read the tensors of a module that are on the meta device; each gets the dtype that it has there.

    Parameters that are shared inside of the module stay shared. Buffers that no file holds must not be on meta.

    Raises:
        ValueError: A tensor has another shape than in the model.
    """
    filled: dict[int, Tensor] = {}
    for path, owner in module.named_modules():
        if owner in leave_out:
            continue
        places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in places:
            for local, blank in tensors.items():
                if blank is None or not blank.is_meta:
                    continue
                if id(blank) not in filled:
                    name = f"{prefix}{path}.{local}" if path else f"{prefix}{local}"
                    filled[id(blank)] = _read(name, blank, read)
                tensors[local] = filled[id(blank)]


def _check_finite(broken: Sequence[str]) -> None:
    if broken:
        raise ValueError(
            f"NaN or Inf in the weights {list(broken[:5])}, expected finite numbers: the checkpoint is damaged; copy "
            f"it again"
        )


def _read(name: str, blank: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    value = read(name)
    if value.shape != blank.shape:
        raise ValueError(
            f"{name!r} has shape {list(value.shape)} in the files, and {list(blank.shape)} by config.json; copy the "
            f"folder again"
        )
    value = value.to(blank.dtype)
    return nn.Parameter(value, blank.requires_grad) if isinstance(blank, nn.Parameter) else value


def _release(module: nn.Module) -> None:
    """Put the tensors of a module, and those of its records, on the meta device."""
    blanks: dict[int, Tensor] = {}
    for owner in module.modules():
        places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in places:
            for local, tensor in tensors.items():
                if tensor is None or local in owner._non_persistent_buffers_set:
                    continue
                if id(tensor) not in blanks:
                    blanks[id(tensor)] = blank_of(tensor)
                tensors[local] = blanks[id(tensor)]
        for record in records_of(owner):
            record.to(torch.device("meta")).attach(owner)


def exact_device(device: str | torch.device | None) -> torch.device | None:
    """The device with its index, so that devices compare; None stays None."""
    if device is None:
        return None
    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if named.type == "cuda" and named.index is None else named


@contextmanager
def on_device(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Inside, the module is on the device; afterwards it is where it was. None: it is not moved."""
    home = device_of(module)
    if device is None or home is None or home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def streamed(blocks: Mapping[str, nn.Module], device: torch.device | None) -> Iterator[None]:
    """Inside, every call of a block runs on the device, one block there at a time; None: blocks are not moved.

    Outputs are moved back to where the block was, so that the code between the blocks needs no change.
    """
    if device is None:
        yield
        return
    visits: dict[nn.Module, Any] = {}

    def come(block: nn.Module, args: Any, kwargs: Any) -> Any:
        visits[block] = (home := device_of(block), stack := ExitStack())
        stack.enter_context(on_device(block, device))
        return tree_move((args, kwargs), device if home is not None else None)

    def leave(block: nn.Module, _args: Any, output: Any) -> Any:
        home, stack = visits.pop(block)
        stack.close()
        return tree_move(output, home)

    with ExitStack() as hooks:
        try:
            for block in blocks.values():
                hooks.callback(block.register_forward_pre_hook(come, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            yield
        finally:
            for _, stack in visits.values():  # a run that was stopped inside a block
                stack.close()
