"""One dense run of the first batch: the order in which blocks and targets are called, their arguments, their links.

Nothing is changed, and no modifier sees the data. The plan of the walk (plan.py) is made from the result, and errors
are raised before hours of work: targets that never run, numbers that are not finite.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_compress.calibration.activations import (
    HIDDEN,
    BlockCall,
    argument,
    first_bad_module,
    take,
    taken_off,
    tensors_of,
)
from lightning_compress.calibration.blocks import modules_outside
from lightning_compress.calibration.finite_checks import FiniteChecks

__all__ = ["NonFiniteError", "Probe", "ProbedBlock", "nonfinite_error", "run_probe"]


@dataclass
class ProbedBlock:
    """One call of one block, as the dense model makes it on the first batch.

    Args:
        name: Dotted name.
        call: Its arguments; :data:`HIDDEN` in the place of the hidden state.
        hidden_at: Position or name of the argument that is the hidden state; None: it gets no tensor.
        linked: Whether the hidden state is the same tensor object that the block before returned, unchanged.
        out_at: Position or key of the hidden state in the output; None: the output itself.
        template: The output with blank tensors.
        keeps_shape: Whether the hidden state has the same shape and dtype before and after the block.
        writes: Whether the block writes into its arguments in place.
    """

    name: str
    call: BlockCall
    hidden_at: int | str | None
    linked: bool
    out_at: int | str | None = None
    template: Any = None
    keeps_shape: bool = False
    writes: bool = False


@dataclass
class Probe:
    """Result of the run.

    Args:
        blocks: Calls of blocks, in order.
        counts: Calls per target; absent: never called.
        order: Targets by their first call.
        gap: Per module outside of all blocks the number of block calls made before its last call.
        inputs: Inputs of the targets outside of all blocks, from their last call.
        last_output: Output of the last block.
        memory: Per block the bytes of the inputs of its targets and of its hidden state, and those of a statistic and
            a solution for the largest targets (walk_memory.py).
        numbers: How large the batch was, as ``numbers_in`` counts.
    """

    blocks: list[ProbedBlock] = field(default_factory=list)
    counts: Counter[nn.Module] = field(default_factory=Counter)
    order: dict[nn.Module, int] = field(default_factory=dict)
    gap: dict[nn.Module, int] = field(default_factory=dict)
    inputs: dict[nn.Module, Any] = field(default_factory=dict)
    last_output: Any = None
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    numbers: int = 1


def run_probe(
    model: nn.Module,
    run: Callable[[], Any],
    blocks: Mapping[str, nn.Module],
    targets: Mapping[nn.Module, str],
    mask: Tensor | None,
) -> Probe:
    """Run the first batch through the dense model and record the calls; hooks of the modifiers are paused.

    ``targets`` are the modules that modifiers have hooked, with their names; ``mask`` says which tokens of the batch
    count, [B, T], None: all. An activation that is NaN or Inf is a ValueError that names the module.
    """
    outside = modules_outside(model, blocks)
    hooks = _ProbeHooks(blocks, targets, set(outside.values()), mask)
    try:
        with taken_off(hooks.on()):
            run()
        hooks.checks.read()
    except NonFiniteError as error:
        raise nonfinite_error(error.kind, error.where, 0, first_bad_module(model, "", run)) from None
    hooks.finish()
    return hooks.probe


def nonfinite_error(kind: str, where: str, batch: int, module: str | None) -> ValueError:
    """The error for activations that are not finite."""
    first = f" (first out of module {module!r})" if module is not None else ""
    return ValueError(
        f"{kind} in {where}{first} for calibration batch {batch}, expected finite numbers: look at that batch's input, "
        f"and at the precision the model runs in (float16 overflows at 65504)"
    )


class NonFiniteError(Exception):
    """An activation is NaN or Inf; the walk then searches for the module that it came from."""

    def __init__(self, kind: str, where: str, batch: int):
        super().__init__(kind, where, batch)
        self.kind, self.where, self.batch = kind, where, batch


class _ProbeHooks:
    """Hooks on blocks and targets that record their calls."""

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        targets: Mapping[nn.Module, str],
        outside: set[nn.Module],
        mask: Tensor | None,
    ):
        self.blocks, self.targets, self.outside, self.mask = blocks, targets, outside, mask
        self.probe, self.checks = Probe(), FiniteChecks()
        self._versions: list[int] = []  # of the arguments of the running block
        self._input_kind: tuple[Any, ...] = ()  # shape and dtype of its hidden input
        self._output: Any = None  # of the block before
        self._output_versions: dict[int, int] = {}
        self._inputs: dict[int, tuple[Tensor, int, int]] = {}  # of the running block: the tensor, rows, columns

    def on(self) -> Iterator[RemovableHandle]:
        """Put the hooks on."""

        def before(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
            return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

        for module in self.outside:
            yield before(module, lambda m, *_: self.probe.gap.__setitem__(m, len(self.probe.blocks)))
        for target, name in self.targets.items():
            yield before(target, lambda m, args, kwargs, n=name: self._on_target(m, n, args, kwargs))
        for name, block in self.blocks.items():
            yield before(block, lambda _m, args, kwargs, n=name: self._before_block(n, args, kwargs))
            yield block.register_forward_hook(partial(self._after_block, name), with_kwargs=True)

    def finish(self) -> None:
        """Describe the last block's output."""
        if self.probe.blocks:
            self.probe.last_output = self._output
            self._describe_output(self.probe.blocks[-1], _first_tensor(self._output))
        self._output = None

    def _on_target(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> None:
        probe = self.probe
        probe.order.setdefault(module, len(probe.order))
        probe.counts[module] += 1
        self.checks.add(args[:1], self.mask, lambda kind: NonFiniteError(kind, f"the input of module {name!r}", 0))
        if module in self.outside:
            probe.inputs[module] = (args, kwargs)
        elif args and isinstance(args[0], Tensor):
            weight = getattr(module, "weight", None)
            R, C = (len(weight), weight[0].numel()) if isinstance(weight, Tensor) and weight.ndim > 1 else (0, 0)
            _, rows, columns = self._inputs.get(id(args[0]), (None, 0, 0))
            self._inputs[id(args[0])] = args[0], rows + R, max(columns, C)

    def _before_block(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_at, out_at = self._link(args, kwargs)
        linked = hidden_at is not None
        if self.probe.blocks:
            self._describe_output(self.probe.blocks[-1], out_at if linked else _first_tensor(self._output))
        self._output = None
        if not linked:
            hidden_at = _first_argument(args, kwargs)
        self.probe.blocks.append(
            ProbedBlock(name, BlockCall.without_hidden(args, kwargs, hidden_at), hidden_at, linked)
        )
        hidden = argument(args, kwargs, hidden_at)
        self._input_kind = _kind(hidden)
        self._inputs = {} if hidden is None else {id(hidden): (hidden, 0, 0)}
        self._versions = [_version(t) for t in tensors_of((args, kwargs))]

    def _after_block(self, name: str, _block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = _hidden_part(output)
        self.checks.add(hidden, self.mask, lambda kind: NonFiniteError(kind, f"the output of block {name!r}", 0))
        versions = [_version(t) for t in tensors_of((args, kwargs))]
        self.probe.blocks[-1].writes = versions != self._versions
        inputs, self._inputs = self._inputs.values(), {}
        work = max((12 * C * C + 20 * R * C for _, R, C in inputs), default=0)
        self.probe.memory[name] = sum(tensor.nbytes for tensor, _, _ in inputs), work
        self._output = output
        self._output_versions = {id(t): _version(t) for _, t in _items(output)}

    def _link(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str | None, int | str | None]:
        """The argument that is a tensor of the output before, unchanged, and its place there; else (None, None)."""
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for at, value in named:
            for place, tensor in _items(self._output):
                if value is tensor and _version(tensor) == self._output_versions.get(id(tensor)):
                    return at, place
        return None, None

    def _describe_output(self, block: ProbedBlock, out_at: Any) -> None:
        block.out_at = out_at if out_at is not _NOWHERE else None
        block.template = _blank(self._output)
        block.keeps_shape = out_at is not _NOWHERE and _kind(take(self._output, out_at)) == self._input_kind


_NOWHERE = HIDDEN  # the place of the hidden state in an output without tensors


def _items(output: Any) -> Iterable[tuple[int | str | None, Tensor]]:
    """Tensors of an output with their positions or keys; None for the output itself."""
    if isinstance(output, Tensor):
        return [(None, output)]
    if isinstance(output, (tuple, list)):
        return [(i, item) for i, item in enumerate(output) if isinstance(item, Tensor)]
    if isinstance(output, Mapping):
        return [(key, item) for key, item in output.items() if isinstance(item, Tensor)]
    return []


def _first_tensor(output: Any) -> Any:
    return next((place for place, _ in _items(output)), _NOWHERE)


def _hidden_part(output: Any) -> Any:
    return next((tensor for _, tensor in _items(output)), None)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    named: list[tuple[int | str, Any]] = [*enumerate(args)]
    named += sorted(kwargs.items(), key=lambda item: item[0] != "hidden_states")
    return next((at for at, value in named if isinstance(value, Tensor)), None)


def _blank(output: Any) -> Any:
    """The same structure with NaN in every tensor (zeros for integers), so that reading one has a visible effect."""
    if isinstance(output, Mapping):
        blank = copy.copy(output)
        for key, item in _items(output):
            blank[key] = _blank(item)  # type: ignore[index]
        return blank
    return tree_map_only(Tensor, lambda t: torch.full_like(t, torch.nan if t.is_floating_point() else 0), output)


def _kind(tensor: Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
