"""SIGTERM while a model is compressed or written: stop at once, with a message and an exit code, as Ctrl-C does.

Lightning's handler sets a flag, which its loops read between batches. After training nothing reads it, and the grace
period of a container or of Slurm runs out.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["stopped_by_sigterm"]

log = logging.getLogger(__name__)


@contextmanager
def stopped_by_sigterm(trainer: Trainer) -> Iterator[None]:
    """Inside, SIGTERM ends the run with exit code 143; a handler of the user is not replaced.

    No incomplete file is left: unfinished ones are removed, complete ones stay.
    """
    former = signal.getsignal(signal.SIGTERM)
    replaceable = former == signal.SIG_DFL or type(former).__module__.startswith(("lightning.", "pytorch_lightning."))
    if not replaceable or threading.current_thread() is not threading.main_thread():
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
