"""Preemption: a signal ends a run at a point that all ranks reach, with everything on the disk that goes on later.

Before the time limit Slurm signals every task (SIGUSR1, or the ``requeue_signal`` of SLURMEnvironment), submitit sends
SIGUSR2; SIGTERM comes from ``scancel``, from a scheduler that needs the node, from a container that ends. Lightning
saves inside its signal handlers, where ranks stand on different sides of a collective: of ten such signals to two ranks
three hung. The handlers here only set a flag, and ranks ask each other for it where all of them pass:

    after a training batch      whose gradients are used up; every few batches, so that asking takes little time
    in validation and test      between batches
    in calibration              after each module of a one-pass walk, and after each block

Then all ranks save ``hpc_ckpt_N.ckpt`` (in training), rank zero requeues the job, and all leave with one exit code: 143
after SIGTERM and where the job was requeued, else 128 + the signal, for which the batch script requeues. The export,
work of rank zero alone, has no such points: a signal stops it at once.

A checkpoint is saved (hpc_checkpoints.py) where a resumed run goes on exactly: after all hooks of a batch, unless
validation or the end of an epoch comes next; during validation it says that this validation is still to be run. At the
end of training, when the model is about to be compressed, a job that is requeued saves one as well.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_compress.layers.forward import patched
from lightning_compress.team import RankError, Team
from lightning_compress.training import random_state
from lightning_compress.training.hpc_checkpoints import HpcCheckpoints

__all__ = ["Preemption", "name_ended_ranks"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]

SECONDS_BETWEEN_QUESTIONS = 0.05
SHARE_OF_QUESTIONS = 0.02  # at most, where a question takes long
REQUEUES = 1000  # added to the number of a signal that requeues: it counts more than SIGTERM, which Slurm sends as well
SECONDS_TO_ANSWER = 10.0
MOST_CALLS_BETWEEN_QUESTIONS = 20  # later steps may be much slower than those that were timed


class _StoppedError(BaseException):
    """Unwinds work of rank zero alone."""


class Preemption:
    """The signals of one entry of the Trainer (fit, validate, test); without a Trainer it never sees one.

    Args:
        trainer: The Trainer.
        team: Its processes, all of which call each method that asks.
    """

    def __init__(self, trainer: Trainer | None = None, team: Team = Team()):  # noqa: B008  (frozen)
        self.team = team
        self._trainer = trainer
        self._requeues: dict[int, Handler] = {}  # signals that requeue the job, and what does it on rank zero
        self._received: int | None = None
        self._left = self._alone = self._at_once = False
        self._training, self._evaluating = _Pace(), _Pace()
        self._evaluation_batches = 0.0  # that come on every rank
        self._validated = self._had_point = self._repeatable = False
        self._random: dict[str, Any] | None = None  # before validation began
        self._callbacks: list[Any] = []

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    @property
    def checkpoints(self) -> HpcCheckpoints:
        """What the next attempt goes on from."""
        return HpcCheckpoints(self.trainer, self.team)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, signals are answered; a user's handler for the requeue signal stays, one for SIGTERM runs as well."""
        trainer, formers, self._callbacks = self.trainer, dict[int, Any](), self.trainer.callbacks
        if threading.current_thread() is threading.main_thread():
            self._requeues = _requeues(trainer)
            numbers = (*self._requeues, signal.SIGTERM)
            formers = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
        loop = trainer.fit_loop
        with ExitStack() as stack:
            stack.enter_context(patched(trainer._signal_connector, _sigterm_notifier_fn=lambda *_: None))
            after_batch = partial(self._after_batch, loop.epoch_loop.on_advance_end)
            stack.enter_context(patched(loop.epoch_loop, on_advance_end=after_batch))
            stack.enter_context(patched(loop, on_advance_end=partial(self._after_epoch, loop.on_advance_end)))
            for number, former in formers.items():
                signal.signal(number, partial(self._receive, former if number == signal.SIGTERM else None))
            try:
                yield
            finally:
                for number, former in formers.items():
                    signal.signal(number, former)
                    trainer._signal_connector._original_handlers[number] = former  # restored after an exception
        if self._received is not None and not self._left and sys.exception() is None:  # not asked for since
            signal.raise_signal(self._received)

    def _receive(self, former: Handler | int | None, number: int, frame: FrameType | None) -> None:
        if self._received is None or number in self._requeues:
            self._received = number
        if callable(former):
            former(number, frame)
        if self._at_once:
            self._at_once = False  # it stops already: unfinished files are being removed
            raise _StoppedError

    # -- where ranks ask ----------------------------------------------------------------------------------------------

    def _after_batch(self, advance_end: Callable[[Any], None], fetcher: Any) -> None:
        """Patched in for the end of a training batch: validation, where it is due, is a part of it."""
        loop = self.trainer.fit_loop.epoch_loop
        if self._is_tuning():
            advance_end(fetcher)
            return
        self._random = random_state.collect() if loop._should_check_val_fx(fetcher) else None
        self._validated = False
        advance_end(fetcher)
        if not (self._validated or self._stops() or loop._is_training_done or loop._should_accumulate()):
            self._had_point = True
            self._ask(self._training, save=True)

    def _after_epoch(self, advance_end: Callable[[], None]) -> None:
        advance_end()
        if self._is_tuning():
            return
        if not (self._had_point or self._stops()):  # a single batch, or validation after each
            self._ask(self._training, save=True)
        self._had_point = False

    def _is_tuning(self) -> bool:
        """Lightning's search for a learning rate or a batch size, which no run goes on with, has its own callbacks."""
        return self.trainer.callbacks is not self._callbacks

    def _stops(self) -> bool:
        """Training ends early, which no checkpoint says."""
        return self.trainer.should_stop and self.trainer.fit_loop._can_stop_early

    def begin_evaluation(self) -> None:
        """Lightning's validation or test begins."""
        loop = self.trainer._evaluation_loop
        self._validated = True
        self.begin_measurement(loop.max_batches if loop._is_sequential else [min(loop.max_batches)])
        self._repeatable = not self._stops() and self.checkpoints.can_repeat_validation()

    def begin_measurement(self, batches: Sequence[int | float | None]) -> None:
        """A pass over loaders of so many batches begins; None: an unknown number."""
        self._repeatable, self._evaluating = False, _Pace()
        counts = self.team.gather(None if None in batches else sum(batches), "the start of an evaluation")
        known = [count for count in counts if count is not None and count != float("inf")]
        unknown = float("inf") if self.team.alone else 0.0  # a rank may end before the others, and not answer
        self._evaluation_batches = min(known) if len(known) == len(counts) else unknown

    def after_evaluation_batch(self) -> None:
        """Ranks ask as long as all of them have batches; after the last one they wait for each other's metrics."""
        self._evaluation_batches -= 1
        if self._evaluation_batches > 0:
            self._ask(self._evaluating, save=self._repeatable, evaluating=True)

    def before_compression(self, *, trained: bool) -> None:
        """Save what training has made: from now on the model changes. For a job that is requeued."""
        if trained and self._requeues and not self.trainer.fast_dev_run:
            self.checkpoints.save()
        self.check()

    def check(self) -> None:
        """Leave, all ranks together, if any has received a signal; in work of rank zero alone, if that one has."""
        if not self._alone:
            self._answer(self.team.gather(self._received, "asking for signals"), save=False)
        elif self._received is not None:
            raise _StoppedError

    def result(self, work: Callable[[], T], what: str, *, at_once: bool = False) -> T:
        """As :meth:`Team.result`; a signal to rank zero ends the work, and then all ranks leave.

        Args:
            work: Work of rank zero alone, which calls :meth:`check` where it may end.
            what: Name of the work.
            at_once: It has no such points: it ends wherever the signal comes.
        """

        def attempt() -> tuple[bool, T | None]:
            self._alone, self._at_once = True, at_once
            try:
                if at_once:
                    self.check()
                return True, work()
            except _StoppedError:
                return False, None
            finally:
                self._alone = self._at_once = False

        finished, result = self.team.result(attempt, what)
        if not finished:
            self.check()
        return result  # type: ignore[return-value]

    def _ask(self, pace: "_Pace", *, save: bool, evaluating: bool = False) -> None:
        if pace.is_due():
            began, mine = time.monotonic(), self._received or 0
            mine += REQUEUES * (mine in self._requeues)
            answer, seconds, cost = self.team.largest(mine, pace.seconds, -pace.cost)
            pace.adapt(seconds, -cost, time.monotonic() - began)
            self._answer([int(answer) % REQUEUES or None], save=save, evaluating=evaluating)

    # -- the answer ---------------------------------------------------------------------------------------------------

    def _answer(self, received: Sequence[int | None], *, save: bool, evaluating: bool = False) -> None:
        numbers = [number for number in received if number is not None]
        if not numbers:
            return
        number = next((number for number in numbers if number in self._requeues), numbers[0])
        self._received = number
        if save and evaluating:
            self.checkpoints.repeat_validation(self._random)
        path = self.checkpoints.save() if save and not self.trainer.fast_dev_run else None
        self._leave(number, path)

    def _leave(self, number: int, path: Path | None) -> NoReturn:
        name, trainer = signal.Signals(number).name, self.trainer
        code = self.team.result(partial(self._requeue, number), "requeueing the job")
        if trainer.is_global_zero:
            saved = f"; {path} is saved, from which ckpt_path='hpc' goes on" if path else ""
            log.warning("%s: this run ends here%s%s", name, saved, ", and its job is requeued" if code else "")
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.procs.clear()  # it kills this process, with another code, when it sees one leave
        self._left = True
        raise SIGTERMException(code or 128 + number)

    def _requeue(self, number: int) -> int | None:
        """The exit code of a job that is requeued; None where it is not."""
        code = 128 + signal.SIGTERM
        if number not in self._requeues:
            return None
        try:
            return code if self._requeues[number](number, None) else None
        except SystemExit as left:  # submitit's, after it has requeued the job; or its local executor does at this code
            return left.code if isinstance(left.code, int) and left.code > 0 else code


def name_ended_ranks(team: Team, error: BaseException) -> None:
    """Add to an error which ranks have ended, where its cause is a lost connection in a collective of training."""
    if team.alone or not re.search("by peer|remote process exited|broken pipe", str(error), re.IGNORECASE):
        return

    def ask() -> None:
        try:
            team.gather(None, "the run")
        except RankError as ended:
            error.add_note(str(ended))
            log.error("%s", ended)

    asking = threading.Thread(target=ask, daemon=True)  # a rank that has not noticed yet does not answer
    asking.start()
    asking.join(SECONDS_TO_ANSWER)


class _Pace:
    """How often ranks ask each other: every so many calls, which is the same number on each of them.

    Attributes:
        seconds: Time per call, measured between the last two questions.
        cost: Time that the last question took on this rank; the shortest of all ranks waited for no other.
    """

    def __init__(self) -> None:
        self._every, self._calls, self._since = 1, 0, time.monotonic()
        self.seconds = self.cost = 0.0

    def is_due(self) -> bool:
        """Count a call; whether to ask now."""
        self._calls += 1
        if self._calls < self._every:
            return False
        self.seconds = (time.monotonic() - self._since) / self._calls
        return True

    def adapt(self, seconds: float, cost: float, own_cost: float) -> None:
        """Ask again after as many calls as fit between two questions, by figures that are equal on all ranks."""
        pause = max(SECONDS_BETWEEN_QUESTIONS, cost / SHARE_OF_QUESTIONS)
        self._every = max(1, min(MOST_CALLS_BETWEEN_QUESTIONS, int(pause / max(seconds, 1e-9))))
        self._calls, self._since, self.cost = 0, time.monotonic(), own_cost


def _requeues(trainer: Trainer) -> dict[int, Handler]:
    """Signals that requeue this job, and what does it: scontrol, or submitit's handler. A user's own handler stays."""
    requeues: dict[int, Handler] = {}
    environment = trainer._accelerator_connector.cluster_environment
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        if callable(handler) and _module(handler).startswith("submitit."):
            requeues[number] = handler
        elif (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and number == environment.requeue_signal
            and handler in (None, signal.SIG_DFL)
        ):
            requeues[number] = _scontrol_requeue
    return requeues


def _module(handler: Any) -> str:
    return getattr(handler, "__module__", None) or ""


def _scontrol_requeue(number: int, frame: FrameType | None) -> bool:
    environ = os.environ
    job = environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be requeued: %s; requeue it by hand, scontrol requeue %s", job, error, job)
        return False
    return True
