"""Inputs of a segment of blocks without computing its blocks: each is stubbed, on the instance, and always unstubbed.

A stub hands the hidden state on in the structure that the probe has seen, so that the code around the blocks (masks,
position embeddings, per-layer choices) runs as it is and each block's own arguments are known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_compress.calibration.activations import Call, argument, put
from lightning_compress.calibration.probe import ProbedBlock

__all__ = ["BrokenLinkError", "capture", "run_to_stop", "stop", "stopped_before", "stubbed"]


class BrokenLinkError(Exception):
    """A stubbed run does not lead from block to block as the dense run did."""


class _Stop(BaseException):
    """Ends a run early; no ``except Exception`` of a model catches it."""


def capture(
    run: Callable[[], Any], segment: Sequence[ProbedBlock], modules: Mapping[str, nn.Module]
) -> tuple[Tensor | None, dict[str, Call]]:
    """Run a batch up to the last block of a segment, and stop there.

    Args:
        run: Puts the batch through the model; blocks before the segment are computed.
        segment: Blocks, the first one with its real input, the others linked to it.
        modules: Blocks by name.

    Returns:
        The first block's hidden input, and the other arguments of every block. When the further blocks take nothing but
        the hidden state there is nothing to learn about them: the run stops at the first one.

    Raises:
        BrokenLinkError: The blocks are not called as the probe has seen them.
    """
    if all(block.call.is_bare for block in segment[1:]):
        segment = segment[:1]
    hidden: Tensor | None = None
    calls: dict[str, Call] = {}

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
        calls[block.name] = Call.without_hidden(args, kwargs, block.hidden_at)

    with ExitStack() as stack:
        for block in segment:
            # the arguments are noted before other hooks of the block change them: in the walk those hooks run again
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

    Stubs keep nothing, so that several runs may be under way inside.
    """
    with ExitStack() as stack:
        for block in segment[:-1]:
            stack.enter_context(_forward_replaced(modules[block.name], _hand_on(block)))
        stack.enter_context(_forward_replaced(modules[segment[-1].name], lambda *_args, **_kwargs: last()))
        yield


@contextmanager
def stopped_before(block: nn.Module) -> Iterator[None]:
    """Inside, :func:`run_to_stop` ends where the block is called."""
    handle = block.register_forward_pre_hook(lambda _m, _args: stop(), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def run_to_stop(run: Callable[[], Any]) -> None:
    """Run up to where it is stopped, or to the end."""
    with suppress(_Stop):
        run()


def stop() -> NoReturn:
    """End the run that :func:`run_to_stop` began."""
    raise _Stop


def _hand_on(block: ProbedBlock) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        return put(block.template, block.out_at, argument(args, kwargs, block.hidden_at))

    return stub


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module.forward`` is another function inside, on this instance only."""
    own = module.__dict__.get("forward")  # accelerate puts one there, too
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
