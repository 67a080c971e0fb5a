"""All batches through a block in lockstep: each module is finished when every batch has arrived at it.

A batch runs on a thread of its own and pauses before each hooked module; only one thread runs at a time, so nothing but
the order of the work changes. When no batch can go on, the module that the block calls first among those waited for has
seen all its inputs: it is finished (``ready``, on the caller's thread), and the batches go on through what it became.
Each module runs once per batch, and every module sees inputs made by all the finished ones before it.

A batch may pass a module by (an expert that got no token), as long as all batches keep one order.

Every waiting batch has a thread, so there are as many as batches; :class:`LockstepThreads` keeps them from block to
block, since cuBLAS has a handle and a workspace for each thread that calls it (walk_memory.py counts them). With more
than MOST_BATCHES batches ``walk="auto"`` takes two passes.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_compress.calibration.activations import taken_off

__all__ = ["MOST_BATCHES", "LockstepThreads", "run_in_lockstep"]

MOST_BATCHES = 512  # of all ranks, so that their number changes no result


class LockstepThreads:
    """Threads that run one piece of work after the other; a context that ends them."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []

    def __enter__(self) -> "LockstepThreads":
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()

    def start(self, name: str, work: Callable[[], object], after: Callable[[], object]) -> None:
        """Run ``work``, which must not raise, on a thread, and then ``after``, when that thread is idle again."""
        worker = self._idle.pop() if self._idle else _Worker()

        def leave() -> None:
            self._idle.append(worker)
            after()

        worker.start(name, work, leave)


def run_in_lockstep(
    works: Sequence[Callable[[], object]],
    modules: Mapping[nn.Module, str],
    ready: Callable[[nn.Module], None],
    turn: Callable[[int], None],
    to_end: bool = True,
    agree: Callable[[int | None], int | None] | None = None,
    numbers: Sequence[int] | None = None,
    threads: LockstepThreads | None = None,
) -> None:
    """Run ``works``, one per batch, finishing each module when all have arrived at it.

    Args:
        works: Forward pass of each batch.
        modules: Modules at which batches pause, with names, in the order of their calls.
        ready: Called once per module that a batch arrives at, on this thread, after the last of its batches.
        turn: Called with the number of a batch before it goes on.
        to_end: False: the rest of the forward passes is not run once all modules are finished.
        agree: Where several processes run batches of one calibration: gives, from the number of the first module that
            batches wait for here (None: none waits), the least one of all processes. All finish that module next.
        numbers: The numbers of the batches in messages; None: 0, 1, ...
        threads: Threads that the batches run on; None: they end when this function returns.

    Raises:
        ValueError: A batch arrives at a module that is finished already: the block calls its modules more than once, or
            in an order that depends on the data.
    """
    lockstep = _Lockstep(modules, ready, to_end, agree or (lambda number: number))
    if len(works) == 1 and agree is None:  # nothing to wait for: no thread is needed
        turn(0)
        with _paused_before(modules, lockstep.arrive), suppress(_CancelledError):
            works[0]()
        return
    with ExitStack() as stack:
        pool = stack.enter_context(LockstepThreads()) if threads is None else threads
        batches = [_Batch(i, i if numbers is None else numbers[i], work, pool) for i, work in enumerate(works)]
        for batch in batches:
            stack.callback(batch.cancel)
        with _paused_before(modules, lockstep.arrive):
            lockstep.run(batches, turn)


class _Lockstep:
    """Which batch runs, and which modules are finished; the arguments are those of :func:`run_in_lockstep`."""

    def __init__(
        self,
        modules: Mapping[nn.Module, str],
        ready: Callable[[nn.Module], None],
        to_end: bool,
        agree: Callable[[int | None], int | None],
    ):
        self.modules, self.ready, self.to_end, self.agree = modules, ready, to_end, agree
        self.in_order = list(modules)
        self.order = {module: i for i, module in enumerate(modules)}
        self.running: _Batch | None = None
        self.finished: set[nn.Module] = set()

    def run(self, batches: Sequence["_Batch"], turn: Callable[[int], None]) -> None:
        """Let the batches go on until nothing waits, or until nothing more is needed."""

        def resume(batch: _Batch) -> None:
            self.running = batch
            turn(batch.index)
            batch.resume()

        for batch in batches:
            resume(batch)
        while (number := self.agree(self._first(batches))) is not None:
            module = self.in_order[number]
            if self.finish(module):
                for batch in batches:  # one that passed modules by may come to them yet, and must not be ignored
                    if batch.waits_at is not None and batch.arrivals < len(self.modules):
                        resume(batch)
                return
            for batch in batches:
                if batch.waits_at is module:
                    resume(batch)

    def _first(self, batches: Sequence["_Batch"]) -> int | None:
        """The number of the first module that a batch waits for."""
        return min((self.order[b.waits_at] for b in batches if b.waits_at is not None), default=None)

    def arrive(self, module: nn.Module) -> None:
        """A batch is about to run a module: on a thread of its own it waits, otherwise the module is finished now."""
        if module in self.finished:
            raise ValueError(
                f"batch {self.running.number if self.running else 0} comes to {self.modules[module]!r} after it was "
                f"finished: the block calls it several times, or in an order that depends on the data; use "
                f"walk='two_pass'"
            )
        if self.running is not None:
            self.running.pause(module)
        elif self.finish(module):
            raise _CancelledError

    def finish(self, module: nn.Module) -> bool:
        """Finish a module; True when nothing that comes after it is needed."""
        self.finished.add(module)
        self.ready(module)
        return not self.to_end and len(self.finished) == len(self.modules)


class _CancelledError(BaseException):
    """Unwinds the thread of a batch that does not go on."""


class _Batch:
    """A piece of work on a thread that runs only between :meth:`resume` and its next :meth:`pause`, or its end.

    Attributes:
        waits_at: The module it waits at; None before it began and after it ended.
        arrivals: At how many modules it has waited.
    """

    def __init__(self, index: int, number: int, work: Callable[[], object], threads: LockstepThreads):
        self.index, self.number, self.work, self.threads = index, number, work, threads
        self.waits_at: nn.Module | None = None
        self.arrivals = 0
        self._go, self._stopped = threading.Lock(), threading.Lock()  # both held: released once for each wait
        self._go.acquire()
        self._stopped.acquire()
        self._error: BaseException | None = None
        self._cancelled = False
        self._context = _thread_state()
        self._began, self._ended = False, threading.Event()

    def resume(self) -> None:
        """Let it run; returns when it pauses or ends. Raises what it raised, with its traceback."""
        self.waits_at = None
        if not self._began:
            self._began = True
            run = partial(contextvars.copy_context().run, self._main)
            self.threads.start(f"batch {self.number}", run, self._end)
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            self._error.add_note(f"raised by calibration batch {self.number} (walk='one_pass')")
            raise self._error

    def pause(self, module: nn.Module) -> None:
        """Called on its own thread."""
        self.waits_at = module
        self.arrivals += 1
        self._hand_back()
        self._go.acquire()
        if self._cancelled:
            raise _CancelledError

    def cancel(self) -> None:
        """End the work where it pauses next, if it still runs."""
        self._cancelled = True
        if self._began:
            if self._go.locked():
                self._go.release()
            self._ended.wait()
        self.waits_at = None
        self._error = None  # its traceback holds the batch's tensors

    def _main(self) -> None:
        try:
            with self._context:
                self.work()
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.waits_at = None
            del self.work  # and with it the inputs it holds

    def _end(self) -> None:
        self._ended.set()
        self._hand_back()

    def _hand_back(self) -> None:
        if self._stopped.locked():  # not when the caller was interrupted and no longer waits
            self._stopped.release()


class _Worker:
    """A thread that waits for work."""

    def __init__(self) -> None:
        self._wake = threading.Semaphore(0)
        self._task: tuple[str, Callable[[], object], Callable[[], object]] | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def start(self, name: str, work: Callable[[], object], after: Callable[[], object]) -> None:
        self._task = name, work, after
        self._wake.release()

    def end(self) -> None:
        self._wake.release()
        self._thread.join()

    def _main(self) -> None:
        while True:
            self._wake.acquire()
            if (task := self._task) is None:
                return
            self._task = None
            self._thread.name, work, after = task
            del task
            work()
            del work
            self._thread.name = "batches"
            after()
            del after


def _paused_before(
    modules: Mapping[nn.Module, str], pause: Callable[[nn.Module], None]
) -> AbstractContextManager[None]:
    """Call ``pause`` before each module runs, after the hooks that are on it now.

    Hooks that come on while it pauses (the fake-quantization of a finished module's input) are run afterwards: torch
    has read the list of hooks before, and would leave them out for the batches that wait here.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        before = set(module._forward_pre_hooks)
        pause(module)
        for key, added in list(module._forward_pre_hooks.items()):
            if key in before:
                continue
            if key in module._forward_pre_hooks_with_kwargs:
                args, kwargs = added(module, args, kwargs) or (args, kwargs)
            elif (result := added(module, args)) is not None:
                args = result if isinstance(result, tuple) else (result,)
        return args, kwargs

    return taken_off(module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules)


def _thread_state() -> AbstractContextManager[None]:
    """A context that gives another thread what torch keeps for each thread, as it is when this function is called.

    Grad mode, autocast, modes of functions and dispatch (``torch.set_default_device`` is one), and CUDA's device and
    stream.
    """
    grad = torch.is_grad_enabled()
    contexts: list[Callable[[], Any]] = [lambda: torch.inference_mode(False), lambda: torch.set_grad_enabled(grad)]
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_initialized() else [])):
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        contexts.append(partial(torch.autocast, kind, dtype=dtype, enabled=enabled, cache_enabled=False))
    if torch.cuda.is_initialized():
        device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
        contexts += [lambda: torch.cuda.device(device), lambda: torch.cuda.stream(stream)]
    functions, dispatches = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            # entering a mode a second time would change what it restores when the caller leaves it
            for mode in functions:
                torch._C._push_on_torch_function_stack(mode)
                stack.callback(torch._C._pop_torch_function_stack)
            for mode in dispatches:
                torch._C._push_on_torch_dispatch_stack(mode)
                stack.callback(torch._C._pop_torch_dispatch_stack, getattr(mode, "_mode_key", None))
            yield

    return entered()
