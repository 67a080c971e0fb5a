"""The end of a run: best weights, metric, calibration, metric again; then the results are written (results.py).

Every rank runs this. All ranks share both measurements; rank zero alone calibrates and writes, while the others wait
for the weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.inputs import IN_TRAINER, check_batch, run_model
from lightning_compress.calibration.sequential import calibrate, end_training
from lightning_compress.core.events import Event
from lightning_compress.core.interruption import marked_when_interrupted
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.state import State
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.training.best_weights import load_best, monitored_metric
from lightning_compress.training.broadcast import beside_weights, send_weights, share, ties, warn_of_workers
from lightning_compress.training.compiled import reset_compiled
from lightning_compress.training.evaluation import Measurement, batches_of, compare, evaluate
from lightning_compress.training.loaders import (
    calibration_batches,
    check_first_batch,
    forward_of,
    to_device,
    validation_loaders,
)
from lightning_compress.training.progress import ProgressReport
from lightning_compress.training.random_state import undisturbed
from lightning_compress.training.results import Results
from lightning_compress.training.run import Run
from lightning_compress.training.sharding import reshard_between, shards

__all__ = ["PostTraining"]


@dataclass
class PostTraining:
    """One end of one run, or the calibration before a window of it opens.

    The Trainer is after training, before its teardown (or after it, when no training took place); ``clock_state`` is
    the callback's clock as numbers.
    """

    trainer: Trainer
    pl_module: LightningModule
    lifecycle: Lifecycle
    state: State
    run: Run
    event: Event
    clock_state: dict[str, Any]
    sample: Any = None

    @property
    def module(self) -> nn.Module:
        assert self.state.model is not None
        return self.state.model

    def compress(self) -> None:
        """Load the best weights, measure, calibrate, finalize, measure."""
        ties_before = ties(self.module)
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(self.trainer, self.pl_module, "fit")  # it would draw over ours until fit ends
        shown = self.trainer.is_global_zero and bar is not None
        with self._undisturbed(), ProgressReport(shown) as progress:
            self._load_best()
            before = self.measure("metric before", progress, may_end=True)
            with self.run.timed("calibration"):
                act = partial(self._act, self.lifecycle.after_training, progress, training_end=True)
                if shards(self.trainer):  # every rank does the same and keeps its shards
                    act()
                else:
                    self.run.preemption.result(act, "calibration")
                    share(self.module, self.pl_module.device, self.run.team)
            self.lifecycle.finalize(self.state)
            after = self.measure("metric after", progress, may_end=True)
            self.run.facts |= compare(before, after, self._summing_device)
        guard_save_pretrained(self.module)
        self.run.facts["beside_weights"] = beside_weights(self.module)
        warn_of_workers(self.trainer, self.module, ties_before)
        reset_compiled(self.pl_module)

    def write_results(self) -> None:
        """Write checkpoint, export and report; every rank calls this."""
        Results(self.trainer, self.pl_module, self.state, self.run, self.event, self.clock_state, self.sample).write()

    def measure_dense(self) -> None:
        """Before a window opens: the metric of the model as training has made it so far; every rank calls this."""
        with self._undisturbed():
            values = self.measure("metric dense", ProgressReport(shown=False)).values
        if values:
            self.run.facts["metric_dense"] = {"step": self.event.global_step, "values": values}

    def check_input(self, batch: Any) -> None:
        """As the first training batch begins: ValueError where ``forward`` cannot take what will calibrate."""
        if any(m.needs.data for m in self.lifecycle.modifiers):
            self.run.team.result(lambda: self._check_input(batch), "checking the first calibration batch")

    def _check_input(self, batch: Any) -> None:
        with self._undisturbed():
            check_first_batch(self.trainer, self.pl_module, self.module, self.run.own_batches, batch)

    def hand_over(self) -> None:
        """During training: calibrate modifiers whose result later modifiers train on; every rank calls this."""
        with self._undisturbed():
            with self.run.timed("calibration"):
                state = self.run.team.result(self._calibrated_state, "calibration")
                send_weights(self.run.team, self.module)
            if not self.trainer.is_global_zero:
                self.lifecycle.weights_loaded(state)
        for modifier in self.lifecycle.modifiers:
            modifier.note_handed_over()
        reset_compiled(self.pl_module)

    def _calibrated_state(self) -> dict[str, Any]:
        self._act(self.lifecycle, ProgressReport(shown=False))
        return self.lifecycle.state_dict()

    def _undisturbed(self) -> AbstractContextManager[None]:
        return undisturbed(self.trainer, self.run.options.calibration.seed)

    def _load_best(self) -> None:
        def load() -> tuple[str | None, dict[str, Any]]:
            if not self.run.options.load_best:
                return None, {}
            return load_best(self.trainer, self.pl_module, self.lifecycle, self.run.saved_files, self.run.name)

        with self.run.timed("load best"):
            path, states = self.run.team.result(load, "loading the best checkpoint")
            self.run.facts["best_checkpoint"] = path
            if path and shards(self.trainer):
                self.run.saved_files.load_shards(path, self.trainer)
            elif path:
                send_weights(self.run.team, self.pl_module)
            self.lifecycle.weights_loaded(states)

    def measure(self, phase: str, progress: Callable[[str, int, int], None], *, may_end: bool = False) -> Measurement:
        """The metric on the validation set; every rank calls this and measures its share.

        With ``may_end`` a signal ends the run between two batches.
        """
        trainer, pl_module, options = self.trainer, self.pl_module, self.run.options
        if not options.evaluate:
            return Measurement()
        with self.run.timed(phase):
            loaders, limits = validation_loaders(trainer, pl_module, options.eval_batches)
            if may_end:
                self.run.preemption.begin_measurement(limits)

            def advance(batches: int) -> None:
                progress(phase, batches, sum(n or 0 for n in limits))
                if may_end:
                    self.run.preemption.after_evaluation_batch()

            measurement = evaluate(
                pl_module,
                self.module,
                batches_of(loaders, limits, partial(to_device, trainer, pl_module)),
                forward=partial(run_model, advice=IN_TRAINER),
                context=trainer.precision_plugin.val_step_context,
                monitor=monitored_metric(trainer),
                device=self._summing_device,
                progress=advance,
            )
        reshard_between(trainer, pl_module)
        return measurement

    def _act(self, lifecycle: Lifecycle, progress: ProgressReport, *, training_end: bool = False) -> None:
        """Calibrate the modifiers of ``lifecycle``; at the end of training, emit TRAINING_END before."""
        batches = self._batches(lifecycle)
        with self._precision(), marked_when_interrupted(self.module, lambda: len(self.state.ledger)):
            if training_end:
                end_training(self.lifecycle, self.state, self.event)
            if any(m.needs.calibration for m in lifecycle.modifiers):
                calibrate(
                    lifecycle,
                    self.state,
                    batches,
                    self.run.options.calibration,
                    clock=self.event,
                    forward=forward_of(self.pl_module, batches or []),
                    progress=lambda text, blocks, of: progress("calibration", blocks, of, text),
                    log=NoLog(self.run.preemption.check) if training_end else NoLog(),  # else it trains on
                )

    def _batches(self, lifecycle: Lifecycle) -> Sequence[Any] | None:
        """Calibration batches; None where no modifier uses data."""
        if not any(m.needs.data for m in lifecycle.modifiers):
            return None
        batches, samples = calibration_batches(self.trainer, self.pl_module, self.run.options, self.run.own_batches)
        self.run.facts |= {"calibration_batches": len(batches), "calibration_samples": samples}
        if not hasattr(self.pl_module, "calibration_step"):
            check_batch(self.module, batches[0], IN_TRAINER)  # again: perhaps nothing was trained
        self.sample = batches[0]
        return batches

    def _precision(self) -> AbstractContextManager[Any]:
        """Half precision runs as in training; mixed precision has float32 weights and calibrates in float32."""
        plugin = self.trainer.precision_plugin
        return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context()

    @property
    def _summing_device(self) -> torch.device:
        """Device on which ranks add up; a single process uses the CPU, since MPS has no float64."""
        return torch.device("cpu") if self.run.team.alone else self.trainer.strategy.root_device
