"""The metric of the model in a Trainer, before and after compression: every rank measures its share."""

from collections.abc import Callable
from functools import partial

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.calibration.inputs import IN_TRAINER, run_model
from lightning_compress.training.best_weights import monitored_metric
from lightning_compress.training.evaluation import Measurement, batches_of, evaluate
from lightning_compress.training.loaders import to_device, validation_loaders
from lightning_compress.training.ranks import summing_device

__all__ = ["measure"]


def measure(
    trainer: Trainer,
    pl_module: LightningModule,
    module: nn.Module,
    eval_batches: int | None,
    progress: Callable[[int, int], None],
) -> Measurement:
    """Measure the model on the validation set; every rank calls this.

    ``progress`` is called with the number of measured batches and that of all.
    """
    loaders, limits = validation_loaders(trainer, pl_module, eval_batches)
    return evaluate(
        pl_module,
        module,
        batches_of(loaders, limits, partial(to_device, trainer, pl_module)),
        forward=partial(run_model, advice=IN_TRAINER),
        context=trainer.precision_plugin.val_step_context,
        monitor=monitored_metric(trainer),
        device=summing_device(trainer),
        progress=lambda batches: progress(batches, sum(n or 0 for n in limits)),
    )
