"""Inputs of a segment of blocks without computing its blocks: each is replaced by a stub, on the instance.

A stub returns its hidden input in the structure of output that the probe saw, so that the code around the blocks
(masks, position embeddings, per-layer choices) runs unchanged and shows the arguments of each block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_compress.calibration.activations import BlockCall, argument, put, taken_off
from lightning_compress.calibration.probe import ProbedBlock
from lightning_compress.layers.forward import patched

__all__ = ["BrokenLinkError", "capture", "is_stubbed", "run_to_stop", "stop", "stopped_before", "stubbed"]


class BrokenLinkError(Exception):
    """With stubs, the blocks are not called as in the dense run."""


class _Stop(BaseException):
    """Ends a run early; ``except Exception`` in a model does not catch it."""


def capture(
    run: Callable[[], Any], segment: Sequence[ProbedBlock], modules: Mapping[str, nn.Module]
) -> tuple[Tensor | None, dict[str, BlockCall]]:
    """Run a batch up to the last block of a segment, and stop there.

    Args:
        run: Runs the batch through the model; blocks before the segment are computed.
        segment: Blocks, the first one with its real input, the others linked to it.
        modules: Blocks by name.

    Returns:
        The first block's hidden input, and the other arguments of every block. Where all further blocks take nothing
        but the hidden state, the run stops at the first one.

    Raises:
        BrokenLinkError: The blocks are not called as in the probe.
    """
    if all(block.call.is_bare for block in segment[1:]):
        segment = segment[:1]
    hidden: Tensor | None = None
    calls: dict[str, BlockCall] = {}

    def note(block: ProbedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal hidden
        value = argument(args, kwargs, block.hidden_at)
        if block.name in calls:
            raise BrokenLinkError(f"block {block.name!r} was called twice")
        if not calls:
            if block is not segment[0] or (block.hidden_at is not None and not isinstance(value, Tensor)):
                raise BrokenLinkError(f"block {block.name!r} is not called as it was on the first batch")
            hidden = value
        elif value is not hidden:
            raise BrokenLinkError(f"block {block.name!r} does not take what the block before it returns")
        calls[block.name] = BlockCall.without_hidden(args, kwargs, block.hidden_at)

    with ExitStack() as stack:
        for block in segment:
            # before other hooks of the block change the arguments: in the walk those hooks run again
            handle = modules[block.name].register_forward_pre_hook(
                lambda _m, args, kwargs, b=block: note(b, args, kwargs), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        stack.enter_context(stubbed(segment, modules, last=stop))
        run_to_stop(run)
    if missing := [block.name for block in segment if block.name not in calls]:
        raise BrokenLinkError(f"block {missing[0]!r} was not called")
    return hidden, calls


@contextmanager
def stubbed(
    segment: Sequence[ProbedBlock], modules: Mapping[str, nn.Module], last: Callable[[], Any]
) -> Iterator[None]:
    """Inside, blocks of the segment return their hidden input, and the last one ``last()``.

    Stubs store nothing, so that several runs may be in progress inside.
    """
    with ExitStack() as stack:
        for block in segment[:-1]:
            stack.enter_context(patched(modules[block.name], forward=_Stub(partial(_hidden_through, block))))
        stack.enter_context(patched(modules[segment[-1].name], forward=_Stub(lambda *_args, **_kwargs: last())))
        yield


def is_stubbed(block: nn.Module) -> bool:
    """True while a stub stands for the block, so that its weights are not used."""
    return isinstance(vars(block).get("forward"), _Stub)


def stopped_before(block: nn.Module) -> AbstractContextManager[None]:
    """Inside, :func:`run_to_stop` ends where the block is called."""
    return taken_off([block.register_forward_pre_hook(lambda _m, _args: stop(), prepend=True)])


def run_to_stop(run: Callable[[], Any]) -> None:
    """Run until :func:`stop` is called, or to the end."""
    with suppress(_Stop):
        run()


def stop() -> NoReturn:
    """End the run that :func:`run_to_stop` began."""
    raise _Stop


@dataclass(frozen=True)
class _Stub:
    """The forward of a block that is not computed."""

    output: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output(*args, **kwargs)


def _hidden_through(block: ProbedBlock, *args: Any, **kwargs: Any) -> Any:
    return put(block.template, block.out_at, argument(args, kwargs, block.hidden_at))
