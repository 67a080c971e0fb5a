"""Signals while a model is compressed or written: SIGTERM stops at once, and SLURM's requeue begins again there.

SIGTERM: Lightning's handler sets a flag, which its loops read between batches. After training nothing reads it, and
the grace period of a container or of Slurm runs out. So it stops the run with a message and an exit code, as Ctrl-C.

Requeue: before the time limit Slurm signals every task. With Lightning's handler all ranks together save
``hpc_ckpt_N.ckpt``, and rank 0 requeues the job; its next attempt resumes from there. At the end of training this does
harm: while rank 0 compresses, the others wait for it and cannot take part in saving, so the job hangs until the limit
kills it; and the saved model would be compressed in part. So the trained model is saved first, and then the signal only
requeues.

Once the model is compressed, its checkpoint takes the place of the last ``hpc_ckpt_N.ckpt``: under Slurm, Lightning
loads that one wherever no ``ckpt_path`` is given, in ``trainer.test`` too, and a job that is requeued during the test
finds its work done.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["requeue_only", "stopped_by_sigterm", "supersede"]

log = logging.getLogger(__name__)


@contextmanager
def stopped_by_sigterm(trainer: Trainer) -> Iterator[None]:
    """Inside, SIGTERM ends the run with exit code 143; a handler of the user is not replaced.

    No incomplete file is left: unfinished ones are removed, complete ones stay.
    """
    former = signal.getsignal(signal.SIGTERM)
    if not _is_replaceable(former) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            return  # it stops already: unfinished files are being removed
        received = True
        log.warning("SIGTERM while the model was compressed: stopping; resume the run to have it compressed")
        if callable(former) and trainer.world_size == 1:
            former(number, frame)  # of several ranks it waits for the others, which wait for rank 0
        raise SIGTERMException(128 + number)

    if trainer.received_sigterm:  # it came in the last batch of training
        raise SIGTERMException(128 + signal.SIGTERM)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def requeue_only(trainer: Trainer, *, save_first: bool) -> Iterator[None]:
    """Inside, the signal requeues the job and saves nothing; a handler of the user is not replaced. For every rank.

    With ``save_first`` a checkpoint is saved now, from which the next attempt resumes; else that starts as this one.
    """
    signum = _requeue_signal(trainer)
    if signum is None:
        yield
        return
    if save_first:
        trainer.save_checkpoint(_folder(trainer) / f"hpc_ckpt_{_last(_folder(trainer)) + 1}.ckpt", weights_only=False)

    def requeue(number: int, frame: FrameType | None) -> None:
        if trainer.is_global_zero:
            _requeue(_job(os.environ))

    former = signal.signal(signum, requeue)
    try:
        yield
    finally:
        signal.signal(signum, former)


def supersede(trainer: Trainer, compressed: Path) -> None:
    """The last ``hpc_ckpt_N.ckpt``, if any, becomes the same file as ``compressed``; every rank calls this."""
    folder = _folder(trainer)
    if trainer.is_global_zero and (number := _last(folder)):
        link = folder / "superseding.ckpt"  # no N in this name
        link.unlink(missing_ok=True)
        try:
            os.link(compressed, link)
        except OSError:  # not on this file system
            shutil.copyfile(compressed, link)
        os.replace(link, folder / f"hpc_ckpt_{number}.ckpt")
    trainer.strategy.barrier("the compressed checkpoint")


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal; None when this is not a Slurm job that requeues itself, or the user handles the signal."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    signum = environment.requeue_signal
    return signum if signum is not None and _is_replaceable(signal.getsignal(signum)) else None


def _is_replaceable(handler: object) -> bool:
    """Whether a handler is not the user's: Lightning's, or the default, as in on_fit_end after Lightning's is gone."""
    return handler == signal.SIG_DFL or type(handler).__module__.startswith(("lightning.", "pytorch_lightning."))


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir)


def _last(folder: Path) -> int:
    """The highest N of ``hpc_ckpt_N.ckpt``; 0 when there is none."""
    matches = [re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name) for path in folder.glob("hpc_ckpt_*.ckpt")]
    return max((int(match[1]) for match in matches if match), default=0)


def _job(environ: os._Environ[str]) -> str:
    """The job as scontrol wants it."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def _requeue(job: str) -> None:
    log.info("signal to requeue: job %s begins again where training ended", job)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be requeued, and goes on until its time limit: %s", job, error)
