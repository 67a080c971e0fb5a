"""The processes of a run: which batches are whose, sums to an owner, results for all, errors that reach every rank.

Tensors go through torch's default process group. Everything else goes through a star around rank 0, in one gloo group
per run whose timeout is a year: a calibration may take longer than the 30 minutes (NCCL: 10) after which a collective
of the default group fails. So a rank that has ended is known by its number, and an error on one rank is raised on all,
at the next exchange of each. A group of tensors is sent only after such an exchange: no rank waits for one that cannot
come.
"""

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankError", "Team"]

T = TypeVar("T")
NO_TIMEOUT = timedelta(days=365)
SMALL = 2**18  # bytes; tensors on the CPU up to here are sent together
_OPERATIONS = {"sum": "SUM", "max": "MAX", "min": "MIN"}
_PACKAGE, _FOLDER = __name__.partition(".")[0], os.path.dirname(os.path.abspath(__file__)) + os.sep


class RankError(RuntimeError):
    """Another rank failed, or has ended; the message names it."""


@dataclass(frozen=True)
class _Report:
    """What a rank brings to an exchange."""

    value: Any = None
    fault: str | None = None  # its error


@dataclass(frozen=True)
class Team:
    """One process, or the processes that work together; every rank calls the methods in the same order.

    Args:
        rank: The number of this process.
        size: How many processes there are; with 1 no method does anything but return its own value.
        star: For all but tensors; None: the default group, whose timeout holds.
    """

    rank: int = 0
    size: int = 1
    star: "_Star | None" = None

    @classmethod
    def present(cls) -> Self:
        """The processes of the default group; a single process without one. No rank waits for another."""
        active = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if active else cls()

    @classmethod
    def of_processes(cls) -> Self:
        """The processes of the default group with a star, which :meth:`close` ends; all ranks call it."""
        team = cls.present()
        if team.size == 1:
            return team
        return cls(team.rank, team.size, _Star(team.rank, team.size))

    def close(self) -> None:
        """End the star; ranks that wait in it get an error."""
        if self.star is not None and dist.is_initialized():
            dist.destroy_process_group(self.star.group)

    def __reduce__(self) -> tuple[Any, ...]:  # groups cannot be pickled, and a spawned worker makes its own
        return type(self), ()

    @property
    def alone(self) -> bool:
        """True for a single process."""
        return self.size == 1

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Inside, only rank 0 shows warnings that come from this package, and its infos: other ranks come to the same.

        A line that another process writes would also go through a progress bar of rank 0.
        """
        if self.rank == 0:
            yield
            return
        logger, show = logging.getLogger(_PACKAGE), warnings.showwarning
        level = logger.level

        def show_others(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
            if not filename.startswith(_FOLDER):
                show(message, category, filename, *where)

        # not catch_warnings, which would make every warning of the user new again
        logger.setLevel(max(level, logging.WARNING))
        warnings.showwarning = show_others  # type: ignore[assignment]
        try:
            yield
        finally:
            logger.setLevel(level)
            if warnings.showwarning is show_others:
                warnings.showwarning = show

    def mine(self, count: int) -> range:
        """Those of ``count`` units of work that are this rank's; a unit is never split."""
        return range(self.rank, count, self.size)

    # -- values -------------------------------------------------------------------------------------------------------

    def gather(self, value: Any, what: str = "the exchange") -> list[Any]:
        """The values of all ranks, in their order, on every rank; they are pickled.

        Args:
            value: The value of this rank.
            what: Name of the work before, for the message when a rank failed in it.

        Raises:
            RankError: A rank failed, or has ended.
        """
        if self.size == 1:
            return [value]
        reports = self._exchange(_Report(value))
        if faults := [f"rank {rank}: {report.fault}" for rank, report in enumerate(reports) if report.fault]:
            raise RankError(f"{what} failed on {'; '.join(faults)}")
        return [report.value for report in reports]

    def agree(self, flag: bool, what: str = "the exchange") -> bool:
        """True on every rank when the flag of any rank is."""
        return any(self.gather(flag, what))

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks; an all-reduce, for many calls where no rank fails in between.

        Two, four and eight ranks took 0.1, 0.2 and 0.7 ms of CPU time on rank 0, and :meth:`gather` 0.5, 1.2 and 1.5.
        """
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=None if self.star is None else self.star.group)
        numbers: list[float] = tensor.tolist()
        return numbers

    def result(self, work: Callable[[], T], what: str, owner: int = 0) -> T:
        """Run ``work`` on one rank and give its result (pickled) to every rank.

        Args:
            work: Called without arguments on the rank ``owner``.
            what: Name of the work, for the message of the other ranks when it fails.
            owner: The rank.

        Raises:
            RankError: On the other ranks, when the owner failed; the owner raises its own error.
        """
        if self.size == 1:
            return work()
        result = self.results(lambda: work() if self.rank == owner else None, what)[owner]
        return cast(T, result)

    def results(self, work: Callable[[], T], what: str) -> list[T]:
        """Run ``work`` on each rank and give the results (pickled), in the order of the ranks, to every rank.

        Raises:
            RankError: On the other ranks, when one failed; that one raises its own error.
        """
        try:
            value = work()
        except BaseException as error:
            self.fail(error)
            raise
        return self.gather(value, what)

    def deal(self, work: Callable[[], Sequence[T]], what: str) -> T:
        """Rank 0 makes one value for each rank; each gets its own (pickled), and only that."""
        values: list[T] = []
        self.result(lambda: values.extend(work()), what)
        if self.size == 1:
            return values[0]
        star = self.star
        assert star is not None, "only a team of Team.of_processes() can deal"
        if self.rank:
            value: T = star.receive(0)
            return value
        for rank in range(1, self.size):
            star.send(values[rank], rank)
        return values[0]

    def fail(self, error: BaseException) -> None:
        """Let the others raise this rank's error at their next exchange, once; a RankError they know already."""
        if self.size == 1 or isinstance(error, RankError) or getattr(error, "told_to_ranks", False):
            return
        error.told_to_ranks = True  # type: ignore[attr-defined]
        try:
            self._exchange(_Report(fault=f"{type(error).__name__}: {error}"))
        except RuntimeError:  # they may have ended, as after a signal to all: this error counts
            return

    def _exchange(self, report: _Report) -> list[_Report]:
        """The reports of all ranks; a rank that has ended is one with a fault."""
        star = self.star
        if star is None:
            reports: list[Any] = [None] * self.size
            dist.all_gather_object(reports, report)
            return reports
        if self.rank:
            try:
                star.send(report, 0)
                reports = star.receive(0)
            except RuntimeError as error:
                raise RankError(f"rank 0 has ended, or the connection to it: {_first_line(error)}") from None
            return reports
        reports = [report]
        for rank in range(1, self.size):
            try:
                reports.append(star.receive(rank))
            except RuntimeError as error:
                reports.append(_Report(fault=_ended(error)))
        for rank in range(1, self.size):
            try:
                star.send(reports, rank)
            except RuntimeError as error:
                reports[rank] = _Report(fault=reports[rank].fault or _ended(error))
        return reports

    # -- tensors ------------------------------------------------------------------------------------------------------

    def reduce_(self, statistic: Any, owner: int | None = None) -> None:
        """Combine a statistic over ranks in place, as its ``reduce`` mapping of attributes declares.

        ``sum``, ``max`` and ``min`` are for tensors and numbers, ``union`` for dicts whose keys no two ranks share.

        Args:
            statistic: The statistic of this rank.
            owner: Only this rank needs the tensors; on the others they are undefined afterwards. None: all need them.
        """
        if self.size == 1:
            return
        values = {name: getattr(statistic, name) for name in statistic.reduce}
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        ranks = self.gather(plain, type(statistic).__name__) if plain else []
        for name in plain:
            setattr(statistic, name, _combined(statistic.reduce[name], [rank[name] for rank in ranks]))
        for name, value in values.items():
            if isinstance(value, Tensor):
                operation = getattr(dist.ReduceOp, _OPERATIONS[statistic.reduce[name]])
                sent = _on_the_wire(value)
                if owner is None:
                    dist.all_reduce(sent, op=operation)
                else:
                    dist.reduce(sent, dst=owner, op=operation)
                if sent is not value:
                    value.copy_(sent)

    def broadcast_(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        """Send tensors of one rank to all others, in place; as bytes, since gloo knows no float8.

        Small ones travel together.
        """
        if self.size == 1:
            return
        small = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes <= SMALL]
        large = [tensor for tensor in tensors if tensor.device.type != "cpu" or tensor.nbytes > SMALL]
        joined = [torch.cat([_bytes(tensor) for tensor in small])] if small else []
        for tensor in (*joined, *large):
            sent = _on_the_wire(tensor)
            dist.broadcast(_bytes(sent), src=owner)
            if sent is not tensor:
                tensor.copy_(sent)
        pieces = joined[0].split([tensor.nbytes for tensor in small]) if small and self.rank != owner else ()
        for tensor, piece in zip(small, pieces, strict=False):
            tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))

    def carry_(self, tensors: Sequence[Tensor], source: int, target: int) -> None:
        """Send tensors of one rank to another one, in place; both call it, other ranks need not."""
        for tensor in tensors:
            sent = _on_the_wire(tensor.detach() if dist.get_backend() == "nccl" else tensor.detach().cpu())
            if self.rank == source:
                dist.send(_bytes(sent), target)
            else:
                dist.recv(_bytes(sent), source)
                if sent is not tensor:
                    tensor.copy_(sent)


class _Star:
    """Messages (pickled) between rank 0 and each other rank.

    The next message is received ahead: gloo burns CPU time for as long as one has come that nothing receives.
    """

    ROOM = 4000  # bytes of a message that needs no second one

    def __init__(self, rank: int, size: int):
        self.group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        self._ahead = {peer: self._receive_ahead(peer) for peer in (range(1, size) if rank == 0 else (0,))}

    def send(self, value: Any, peer: int) -> None:
        body = bytearray(pickle.dumps(value))
        head = bytearray(len(body).to_bytes(8, "little") + body[: self.ROOM].ljust(self.ROOM))
        dist.send(torch.frombuffer(head, dtype=torch.uint8), peer, group=self.group)
        if len(body) > self.ROOM:
            dist.send(torch.frombuffer(body, dtype=torch.uint8), peer, group=self.group)

    def receive(self, peer: int) -> Any:
        work, head = self._ahead.pop(peer) if peer in self._ahead else self._receive_ahead(peer)
        work.wait()
        message = head.numpy().tobytes()
        size, body = int.from_bytes(message[:8], "little"), message[8:]
        if size > self.ROOM:
            rest = torch.empty(size, dtype=torch.uint8, device="cpu")
            dist.recv(rest, peer, group=self.group)
            body = rest.numpy().tobytes()
        with suppress(RuntimeError):  # the peer has ended after this message, which counts; the next receive raises
            self._ahead[peer] = self._receive_ahead(peer)
        return pickle.loads(body[:size])

    def _receive_ahead(self, peer: int) -> tuple[Any, Tensor]:
        head = torch.empty(8 + self.ROOM, dtype=torch.uint8, device="cpu")
        return dist.irecv(head, peer, group=self.group), head


def _combined(operation: str, values: Sequence[Any]) -> Any:
    """Numbers or dicts of all ranks, in the order of the ranks."""
    if operation == "union":
        return {key: value for each in values for key, value in each.items()}
    functions: dict[str, Callable[[Sequence[Any]], Any]] = {"sum": sum, "max": max, "min": min}
    return functions[operation](values)


def _on_the_wire(tensor: Tensor) -> Tensor:
    """Contiguous, and on the accelerator where the backend (NCCL) knows no other place."""
    return (tensor.cuda() if dist.get_backend() == "nccl" else tensor).contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, that of a copy of any other."""
    return tensor.detach().flatten().view(torch.uint8)


def _ended(error: RuntimeError) -> str:
    return f"it has ended, or the connection to it: {_first_line(error)}"


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
