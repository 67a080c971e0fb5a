"""Work between training steps that leaves no trace in training: random state, stage and modes are put back."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(trainer: Trainer, seed: int) -> Iterator[None]:
    """Afterwards the random state and the Trainer's stage are as before; inside, no autocast and no gradients.

    Args:
        trainer: In its fit.
        seed: Seed of torch's random state inside. Python's and NumPy's, which augmentation may use, are put back, too.
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
