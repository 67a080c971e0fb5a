"""The loss of the user's ``training_step`` on calibration batches, without what else the step does.

Inside, nothing is logged, optimizers and schedulers stand still, no rank waits for another, and the step draws random
numbers by the number of the batch. Afterwards metrics, buffers, the LightningModule's own attributes and the random
state are as before.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_compress.layers.forward import eval_mode, gradients_for, patched
from lightning_compress.training.evaluation import metric_states_kept

__all__ = ["check_training_step", "training_loss"]


def check_training_step(pl_module: LightningModule) -> None:
    """ValueError where ``training_step`` cannot be called on a calibration batch."""
    name = type(pl_module).__name__
    if not is_overridden("training_step", pl_module):
        raise ValueError(f"objective='training_step', and {name} has none: write it, or use objective: loss or output")
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"objective='training_step': {name}.training_step takes dataloader_iter, and a survey has batches; write "
            f"training_step(self, batch, batch_idx), or use objective: loss or output"
        )


def training_loss(trainer: Trainer, pl_module: LightningModule, seed: int, batch: Any, number: int) -> Tensor | None:
    """The loss of ``training_step`` on a batch, in eval mode; with manual optimization the sum of what it runs back.

    Returns:
        None where the step returns None.

    Raises:
        ValueError: The step returns neither a tensor with one number nor a dict with one as ``loss``.
    """
    manual: list[Tensor] = []
    arguments = [number] if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else []
    with _without_traces(trainer, pl_module, manual.append, seed * 1_000_003 + number):
        try:
            output: Any = pl_module.training_step(batch, *arguments)
        except Exception as error:
            error.add_note(
                f"This was {type(pl_module).__name__}.training_step on calibration batch {number}, for the gradients "
                f"of objective='training_step'; calibration batches must be such as it trains on, labels included."
            )
            raise
    if not pl_module.automatic_optimization:
        return torch.stack([loss.float() for loss in manual]).sum() if manual else None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if output is None or (isinstance(loss, Tensor) and loss.numel() == 1):
        return loss
    raise ValueError(
        f"{type(pl_module).__name__}.training_step returned a {type(output).__name__} for calibration batch {number}; "
        f"expected a tensor with one number, a dict with such a 'loss', or None"
    )


@contextmanager
def _without_traces(
    trainer: Trainer, pl_module: LightningModule, run_back: Callable[[Tensor], None], seed: int
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        stack.enter_context(eval_mode(pl_module))
        stack.enter_context(gradients_for(pl_module, ()))
        stack.enter_context(metric_states_kept(pl_module))
        for metric in [module for module in pl_module.modules() if isinstance(module, Metric)]:
            stack.enter_context(patched(metric, sync_on_compute=False, dist_sync_on_step=False))
        stack.enter_context(_buffers_kept(pl_module))
        stack.enter_context(patched(pl_module, **_attributes(pl_module), **_stand_ins(pl_module, run_back)))
        loggers = trainer.loggers
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield


def _attributes(pl_module: LightningModule) -> dict[str, Any]:
    """Its own attributes of plain types; a step may add to lists, and count."""
    of_lightning = vars(LightningModule())
    plain = (int, float, str, type(None), list, dict, set)
    names = [name for name, value in vars(pl_module).items() if name not in of_lightning and type(value) in plain]
    return {name: copy(vars(pl_module)[name]) for name in names}


def _stand_ins(pl_module: LightningModule, run_back: Callable[[Tensor], None]) -> dict[str, Callable[..., Any]]:
    """Methods of a LightningModule that do nothing, or not what they do while training."""
    silent = ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    optimizers, schedulers = (None, None) if pl_module.automatic_optimization else _optimizers_of(pl_module)
    return {
        **dict.fromkeys(silent, _do_nothing),
        "manual_backward": lambda loss, *args, **kwargs: run_back(loss),
        "all_gather": lambda data, *args, **kwargs: data,  # as in one process
        "optimizers": lambda *args, **kwargs: optimizers,
        "lr_schedulers": lambda: schedulers,
    }


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a method."""


def _optimizers_of(pl_module: LightningModule) -> tuple[Any, Any]:
    """What ``optimizers()`` and ``lr_schedulers()`` return, standing still."""
    both = pl_module.optimizers(), pl_module.lr_schedulers()
    idle = [[_Idle(x) for x in each] if isinstance(each, list) else each and _Idle(each) for each in both]
    return idle[0], idle[1]


class _Idle:
    """An optimizer or a scheduler of the user: it can be read, and a step only runs its closure."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing has a gradient."""

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


@contextmanager
def _buffers_kept(root: nn.Module) -> Iterator[None]:
    """Buffers that are written or replaced inside have their values back afterwards."""
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, values in before:
                module._buffers[name] = buffer
                if buffer._version != version:  # else a graph may hold it
                    buffer.copy_(values)
