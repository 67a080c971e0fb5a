"""Activations of a model while it calibrates: how they are stored, and whether they are finite.

A block's call is stored in two parts: its arguments, with :data:`HIDDEN` in the place of the hidden state, and the
hidden state itself, which the block's output replaces as the walk advances. The other arguments (masks, position
embeddings) are stored by reference, each object once, however many blocks and batches share it.

Shapes: B batch, T tokens, C channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_compress.calibration.hidden_file import HiddenFile
from lightning_compress.calibration.inputs import run_model
from lightning_compress.layers.finite import is_finite, nonfinite
from lightning_compress.layers.matching import is_layer

__all__ = [
    "HIDDEN",
    "BatchRunner",
    "BlockCall",
    "SegmentInputs",
    "argument",
    "check_weights",
    "device_of",
    "find_nonfinite",
    "small_sample",
    "first_bad_module",
    "numbers_in",
    "put",
    "rows_in",
    "take",
    "taken_off",
    "tensors_of",
    "token_mask",
]


class Hidden:
    """Placeholder of the hidden state."""


HIDDEN: Final = Hidden()
SAMPLE_TOKENS = 32  # enough for the probe; full rows took 9 % of a walk over 16 of them


@dataclass
class BlockCall:
    """One call of a block: ``block(*args, **kwargs)``, :data:`HIDDEN` in the place of the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(hidden if a is HIDDEN else a for a in self.args)
        return args, {k: hidden if v is HIDDEN else v for k, v in self.kwargs.items()}

    @staticmethod
    def without_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int | str | None) -> "BlockCall":
        """The call without its argument ``at`` (a position or a name; None: no argument is the hidden state)."""
        return BlockCall(
            tuple(HIDDEN if i == at else a for i, a in enumerate(args)),
            {k: HIDDEN if k == at else v for k, v in kwargs.items()},
        )

    @property
    def is_bare(self) -> bool:
        """True when the hidden state is the only argument."""
        return len(self.args) + len(self.kwargs) == 1 and any(a is HIDDEN for a in [*self.args, *self.kwargs.values()])


@dataclass
class SegmentInputs:
    """Inputs of one segment of blocks, for every batch.

    Args:
        device: Device on which they are stored; None: the one on which they are computed.
        hidden: Per batch the input of the next block, such as [B, T, C]; in memory, or on the disk.
        calls: Per batch the other arguments, by block name.
    """

    device: torch.device | None
    hidden: list[Tensor | None] | HiddenFile = field(default_factory=list)
    calls: list[dict[str, BlockCall]] = field(default_factory=list)
    _previous: list[Tensor] = field(default_factory=list)
    _arrivals: dict[int, tuple[torch.cuda.Event, torch.device]] = field(default_factory=dict)

    @classmethod
    def kept(cls, device: torch.device | None, folder: Path | None) -> "SegmentInputs":
        """No batch yet; hidden states go into a file in ``folder``, where one is given."""
        return cls(device, [] if folder is None else HiddenFile(folder))

    def add(self, hidden: Tensor | None, calls: Mapping[str, BlockCall]) -> None:
        """Store a further batch; tensors that several calls share, or that equal those of the batch before, once."""
        moved: dict[int, Tensor] = {}
        equals, self._previous = self._previous, []

        def store(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                value = tensor.to(self.device) if self.device is not None else tensor
                value = next((old for old in equals if _same(old, value)), value)
                moved[id(tensor)] = value
                self._previous.append(value)
            return moved[id(tensor)]

        self.calls.append({n: BlockCall(*tree_map_only(Tensor, store, (c.args, c.kwargs))) for n, c in calls.items()})
        self.hidden.append(None)
        if hidden is not None:
            self.replace(len(self.hidden) - 1, hidden)

    def replace(self, batch: int, hidden: Tensor) -> None:
        """The block's output becomes the next block's input; the old input is released."""
        if isinstance(self.hidden, HiddenFile) or self.device is None:
            self.hidden[batch] = hidden
            return
        self.hidden[batch] = hidden.to(self.device, non_blocking=True)
        if hidden.is_cuda and self.device.type == "cpu":
            event = torch.cuda.Event()
            with torch.cuda.device(hidden.device):
                event.record()
            self._arrivals[batch] = event, hidden.device

    def read(self, batch: int, reader: torch.device | None = None) -> Tensor | None:
        """The hidden state, for work on the device ``reader``; None: on the host.

        A copy from a GPU to the host is waited for, but not by that GPU, which copies in order.
        """
        if batch in self._arrivals and reader != self._arrivals[batch][1]:
            self._arrivals.pop(batch)[0].synchronize()
        return self.hidden[batch]

    def dense_copy(self) -> "SegmentInputs":
        """The same calls with hidden states of their own, for those of the dense model."""
        if isinstance(self.hidden, HiddenFile):
            return SegmentInputs(self.device, HiddenFile(self.hidden.folder, self.hidden), self.calls)
        return SegmentInputs(self.device, list(self.hidden), self.calls, _arrivals=dict(self._arrivals))

    def arguments(
        self, batch: int, name: str, device: torch.device | None, copy: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the block for one batch, on its device; ``copy`` for a block that writes into them."""
        hidden = self.read(batch, device)
        call = self.calls[batch].get(name, BlockCall((HIDDEN,), {}))
        arguments = call.with_hidden(hidden) if hidden is not None else (call.args, call.kwargs)

        def place(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=True) if device is not None else tensor
            return moved.clone() if copy and moved is tensor else moved

        args, kwargs = tree_map_only(Tensor, place, arguments)
        return args, kwargs

    def drop(self, name: str) -> None:
        """Release the arguments of a block that is finished."""
        for calls in self.calls:
            calls.pop(name, None)


class BatchRunner:
    """Runs a model on a calibration batch, by default as :mod:`lightning_compress.calibration.inputs` says.

    Args:
        model: The model.
        forward: ``forward(model, batch)`` instead of the default.
    """

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None = None):
        self.model, self.forward = model, forward or run_model

    def __call__(self, batch: Any) -> Any:
        return self.forward(self.model, tree_move(batch, device_of(self.model)))

    def own_output(self, batch: Any) -> Any:
        """The output of the model itself: what ``forward`` returns may be anything. Of several calls the last."""
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[:] = [output]

        handle = self.model.register_forward_hook(keep)
        try:
            returned = self(batch)
        finally:
            handle.remove()
        return outputs[0] if outputs else returned


def small_sample(batch: Any) -> Any:
    """A small batch of the same kind, to see what a model does with it; None when it is not clear how to cut one.

    That is the first row of every tensor, and of token ids (all tensors of integers, [B, T]) the first few tokens.
    """
    tree = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = tensors_of(tree)
    rows = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(rows) != 1 or 0 in rows:
        return None
    are_ids = len({t.shape for t in tensors}) == 1 and all(t.ndim == 2 and not t.is_floating_point() for t in tensors)
    sample = tree_map_only(Tensor, lambda t: t[:1, :SAMPLE_TOKENS] if are_ids else t[:1], tree)
    return sample if any(a.shape != b.shape for a, b in zip(tensors, tensors_of(sample), strict=True)) else None


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def numbers_in(batch: Any) -> int:
    """How large a batch is: the numbers in its first tensor, such as tokens; 1 where it has none."""
    tensors = tensors_of(dict(batch) if isinstance(batch, Mapping) else batch)
    return tensors[0].numel() if tensors else 1


def rows_in(batch: Any) -> int:
    """The first dimension of the first tensor of a batch; 1 where it has none."""
    tensors = tensors_of(dict(batch) if isinstance(batch, Mapping) else batch)
    return max(1, len(tensors[0])) if tensors and tensors[0].ndim else 1


def tree_move(tree: Any, device: torch.device | None) -> Any:
    """The same structure with its tensors on the device."""
    if device is None:
        return tree
    if isinstance(tree, Mapping):  # a BatchEncoding is not a node of torch's trees
        return {key: tree_move(value, device) for key, value in tree.items()}
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), tree)


def device_of(module: nn.Module) -> torch.device | None:
    """Device of the module's first parameter or buffer, of those in memory where there are any; None without any."""
    devices = [tensor.device for tensor in chain(module.parameters(), module.buffers())]
    return next((device for device in devices if device.type != "meta"), devices[0] if devices else None)


def token_mask(batch: Any, key: str = "attention_mask") -> Tensor | None:
    """True for tokens that count, bool [B, T], from the batch's ``attention_mask``; None when all do."""
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int | str | None) -> Any:
    """The argument at a position or of a name; None when there is none."""
    if isinstance(at, int):
        return args[at] if at < len(args) else None
    return kwargs.get(at) if at is not None else None


def take(output: Any, at: int | str | None) -> Any:
    """The hidden state in a block's output; ``at`` None: the output itself."""
    return output if at is None else output[at]


def put(template: Any, at: int | str | None, hidden: Tensor) -> Any:
    """An output built like ``template`` with this hidden state in its place."""
    if at is None:
        return hidden
    if isinstance(template, tuple):
        items = [hidden if i == at else item for i, item in enumerate(template)]
        return type(template)(*items) if hasattr(template, "_fields") else tuple(items)
    if isinstance(template, list):
        return [hidden if i == at else item for i, item in enumerate(template)]
    changed = type(template)(template)
    changed[at] = hidden
    return changed


@contextmanager
def taken_off(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks are on inside."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


# -- is it finite -----------------------------------------------------------------------------------------------------


def check_weights(model: nn.Module) -> None:
    """ValueError names the parameters and buffers that hold NaN or Inf."""
    if bad := nonfinite(model):
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"NaN or Inf in the weights {bad[:5]}{more}, expected finite numbers: training has diverged, or the "
            f"checkpoint is damaged; load a sound one before compressing"
        )


def find_nonfinite(tree: Any, mask: Tensor | None) -> str | None:
    """``NaN`` or ``Inf`` when a tensor of the structure holds one at a token that counts, else None."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and not is_finite(leaf):
            counted = leaf[mask.to(leaf.device)] if mask is not None and leaf.shape[:2] == mask.shape else leaf
            if not torch.isfinite(counted).all():
                return "NaN" if torch.isnan(counted).any() else "Inf"
    return None


def first_bad_module(model: nn.Module, prefix: str, run: Callable[[], Any]) -> str | None:
    """Run again: name of the first innermost module whose output is not finite although its input is, or None."""
    names: list[str] = []

    def look(name: str, args: Any, output: Any) -> None:
        if not names and find_nonfinite(output, None) and not find_nonfinite(args, None):
            names.append(name)

    leaves = [(n, m) for n, m in model.named_modules(prefix=prefix) if is_layer(m)]
    with taken_off(m.register_forward_hook(lambda _m, args, out, n=n: look(n, args, out)) for n, m in leaves):
        run()
    return names[0] if names else None


def _same(old: Tensor, new: Tensor) -> bool:
    if old is new:
        return True
    alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return alike and torch.equal(old, new)
