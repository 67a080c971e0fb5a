"""The random state of a run in its checkpoints: torch's (CPU and GPUs), Python's and NumPy's, of every rank.

Lightning's checkpoints hold none, so a resumed run would draw other dropout masks than the run that was killed. Work
between training steps leaves no trace in it.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_compress.team import Team

__all__ = ["LoadedRandomState", "collect", "collect_all", "restore", "restore_own", "undisturbed"]


def collect() -> dict[str, Any]:
    """The random state of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64, device="cpu"), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        words = torch.tensor([int(key) for key in keys], dtype=torch.int64, device="cpu")
        state["numpy"] = {"kind": str(kind), "keys": words, "rest": [int(position), int(has_gauss), float(cached)]}
    return state


def collect_all(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all ranks; every rank calls this."""
    return Team.present().gather(state)


def restore(states: list[dict[str, Any]]) -> None:
    """Continue as after :func:`collect_all`; a rank that ``states`` has none for leaves its random state as it is."""
    rank = Team.present().rank
    if rank < len(states):
        restore_own(states[rank])


def restore_own(state: dict[str, Any]) -> None:
    """Continue as after :func:`collect`."""
    torch.set_rng_state(state["torch"].cpu())
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if len(cuda := state.get("cuda", ())) == torch.cuda.device_count() and cuda:
        torch.cuda.set_rng_state_all([one.cpu() for one in cuda])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, rest = state["numpy"]["kind"], state["numpy"]["keys"], state["numpy"]["rest"]
        numpy.random.set_state((kind, keys.tolist(), *rest))


class LoadedRandomState:
    """The states of a checkpoint, from its loading to the moment when training goes on."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] | None = None

    def restore(self) -> None:
        """Restore them, once."""
        states, self.states = self.states, None
        if states is not None:
            restore(states)


@contextmanager
def undisturbed(trainer: Trainer, seed: int) -> Iterator[None]:
    """Afterwards the random state and the Trainer's stage are as before; inside, no autocast and no gradients.

    ``seed`` is for torch's random state. Python's and NumPy's, which augmentation may use, are put back, too.
    """
    stage = trainer.state.stage
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(trainer.strategy.root_device.type, enabled=False))
        stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(seed)
        trainer.state.stage = RunningStage.VALIDATING  # augmentation reads trainer.training
        try:
            yield
        finally:
            trainer.state.stage = stage
