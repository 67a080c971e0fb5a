"""The end of a run: best weights, metric, calibration, metric again; then the results are written (results.py).

Every rank runs this. All ranks share both measurements, and the calibration where every modifier can combine its
statistics (``Needs.team``); otherwise rank 0 calibrates alone, and the others wait for the weights. Rank 0 writes.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_compress.calibration.group_log import GroupLog, NoLog
from lightning_compress.calibration.inputs import IN_TRAINER, check_batch
from lightning_compress.calibration.sequential import calibrate, end_training
from lightning_compress.core.events import Event
from lightning_compress.core.interruption import marked_when_interrupted
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.state import State
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.layers.dense_keys import inactive
from lightning_compress.report.progress import ProgressReport
from lightning_compress.resume.folder_log import opened, unable
from lightning_compress.structure.surgery import record_of
from lightning_compress.team import Team
from lightning_compress.training.best_weights import load_best, monitored_metric
from lightning_compress.training.broadcast import beside_weights, mend, send_weights, share, ties, warn_of_workers
from lightning_compress.training.compiled import reset_compiled
from lightning_compress.training.evaluation import Measurement, compare
from lightning_compress.training.gate import check_metrics, check_uncut, gate_failures, judge, raise_failures
from lightning_compress.training.loaders import calibration_batches, check_first_batch, forward_of, validation_loaders
from lightning_compress.training.measurement import measured, summing_device
from lightning_compress.training.overrides import leave_dense, more_bits
from lightning_compress.training.promotion import Promotion
from lightning_compress.training.random_state import undisturbed
from lightning_compress.training.results import Results
from lightning_compress.training.run import Run
from lightning_compress.training.sharding import block_by_block, reshard_between, shards
from lightning_compress.training.user_loss import training_loss

__all__ = ["PostTraining"]

logger = logging.getLogger(__name__)


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
            check_metrics(self.run.options.gates, list(before.values))
            promotion = self._promotion()
            self._compress(before, progress)
            while promotion is not None and gate_failures(self.run.facts):
                if not promotion.begin_round(self.run.options.calibration.seed):
                    break
                self._compress(before, progress)
                promotion.note(self.run.facts["gate"])
            self.run.facts |= {} if promotion is None else promotion.end()
        guard_save_pretrained(self.module)
        self.run.facts["beside_weights"] = beside_weights(self.module)
        warn_of_workers(self.trainer, self.module, ties_before)
        reset_compiled(self.pl_module)

    def _compress(self, before: Measurement, progress: ProgressReport) -> None:
        """Calibrate, finalize, measure, judge."""
        with self.run.timed("calibration"):
            self._end_training()
            self._calibrate(self.lifecycle.after_training, progress)
        self.lifecycle.finalize(self.state)
        after = self.measure("metric after", progress, may_end=True)
        self.run.facts |= compare(before, after, summing_device(self.trainer))
        self._judge(after)

    def _promotion(self) -> Promotion | None:
        """What compresses again where a gate does not hold; None where that is not asked for."""
        outputs, gates = self.run.outputs, self.run.options.gates
        if self.run.options.on_gate != "promote" or outputs is None:
            return None
        self._check_unsharded()
        rounds, folder = max(gate.rounds for gate in gates), outputs.checkpoint.parent
        return Promotion(self.lifecycle, self.state, rounds, folder, outputs.log)

    def _check_unsharded(self) -> None:
        if self.run.options.on_gate == "promote" and shards(self.trainer):
            raise ValueError(
                f"on_gate='promote' goes back to whole dense weights, which {type(self.trainer.strategy).__name__} "
                f"shards; use on_gate='fail', or train with strategy='ddp' or on one device"
            )

    def write_results(self) -> None:
        """Write checkpoint, export and report; every rank calls this."""
        modifiers = self.lifecycle.modifiers
        self.run.facts |= {"leave_dense": leave_dense(modifiers), "more_bits": more_bits(modifiers)}
        Results(self.trainer, self.pl_module, self.state, self.run, self.event, self.clock_state, self.sample).write()

    def end(self) -> None:
        """After the results: leave where a signal came meanwhile, or fail where a gate does not hold."""
        self.run.preemption.check()
        if self.run.outputs is not None:
            raise_failures(self.run.facts.get("gate", ()), str(self.run.outputs.report.parent))

    def _judge(self, after: Measurement) -> None:
        """The gates, on all ranks as on rank zero."""
        facts, gates, dense = self.run.facts, self.run.options.gates, self.run.dense
        if not gates:
            return
        stored = facts.get("metric_dense")  # of an earlier process, where a run is resumed: without tokens
        dense = Measurement(stored["values"]) if dense is None and stored else dense
        paired = compare(dense, after, summing_device(self.trainer))["metric"] if dense is not None else None
        entries = judge(gates, facts["metric"], paired, stored["step"] if stored else None)
        facts["gate"] = self.run.team.result(lambda: entries, "the gates")

    def measure_dense(self) -> None:
        """Before a window opens: the metric of the model as training has made it so far; every rank calls this.

        A window that begins with training is open since set-up: here parametrizations let the dense weights pass. Of a
        model that was cut by then, the dense one is gone.
        """
        if self.event.global_step == 0 and record_of(self.module):
            check_uncut(self.run.options.gates)
            return rank_zero_info("the model was cut at set-up: the metric of the dense model is not measured")
        with self._undisturbed(), inactive(self.module):
            dense = self.measure("metric dense", ProgressReport(shown=False))
        if dense.values:
            self.run.dense = dense
            self.run.facts["metric_dense"] = {"step": self.event.global_step, "values": dense.values}

    def check_input(self, batch: Any) -> None:
        """As the first training batch begins: ValueError where ``forward`` cannot take what will calibrate.

        So it is where validation does not measure the metric of a gate; one batch of each loader shows that.
        """
        self._check_unsharded()
        if gates := self.run.options.gates:
            with self._undisturbed():
                first = self.measure("check of the gates", ProgressReport(shown=False), batches=1)
            check_metrics(gates, list(first.values))
        if any(m.needs.data for m in self.lifecycle.modifiers):
            self.run.team.result(lambda: self._check_input(batch), "checking the first calibration batch")

    def _check_input(self, batch: Any) -> None:
        with self._undisturbed():
            check_first_batch(self.trainer, self.pl_module, self.module, self.run.own_batches, batch)

    def hand_over(self) -> None:
        """During training: calibrate modifiers whose result later modifiers train on; every rank calls this."""
        with self._undisturbed(), self.run.timed("calibration"):
            self._calibrate(self.lifecycle, ProgressReport(shown=False), handing_over=True)
        for modifier in self.lifecycle.modifiers:
            modifier.note_handed_over()
        reset_compiled(self.pl_module)

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

    def measure(
        self,
        phase: str,
        progress: Callable[[str, int, int], None],
        *,
        may_end: bool = False,
        batches: int | None = None,
    ) -> Measurement:
        """The metric on the validation set, at most ``batches`` of each loader; every rank measures its share.

        With ``may_end`` a signal ends the run between two batches.
        """
        trainer, pl_module, options = self.trainer, self.pl_module, self.run.options
        if not options.evaluate:
            return Measurement()
        with self.run.timed(phase):
            loaders, limits = validation_loaders(trainer, pl_module, batches or options.eval_batches)
            if may_end:
                self.run.preemption.begin_measurement(limits)

            def advance(batches: int) -> None:
                progress(phase, batches, sum(n or 0 for n in limits))
                if may_end:
                    self.run.preemption.after_evaluation_batch()

            measurement = measured(trainer, pl_module, self.module, loaders, limits, monitored_metric(trainer), advance)
        reshard_between(trainer, pl_module)
        return measurement

    def _end_training(self) -> None:
        """Emit TRAINING_END, on rank 0, and give what it changed to all."""
        team = self.run.team
        handled = any(m.handles_training_end for m in self.lifecycle.modifiers)
        with self._precision(), self._marked():
            if not handled or shards(self.trainer):  # then every rank does the same to its shards
                end_training(self.lifecycle, self.state, self.event)
                return
            team.result(lambda: end_training(self.lifecycle, self.state, self.event), "the end of training")
        share(self.module, self.pl_module.device, team)

    def _calibrate(self, lifecycle: Lifecycle, progress: ProgressReport, handing_over: bool = False) -> None:
        """Calibrate the modifiers of ``lifecycle``: all ranks together, or rank 0 for all."""
        calibrating = [m for m in lifecycle.modifiers if m.needs.calibration]
        if not calibrating:
            return
        team, single, sharded = self.run.team, self._single(), shards(self.trainer)
        alone = [m.name for m in calibrating if m.needs.team == "alone"]
        if team.alone or not alone or sharded:
            shares = partial(self._shares, lifecycle, sharded, bool(alone))
            batches, each_has_all = team.deal(shares, "loading calibration batches")
            self.sample = batches[0] if batches else None
            (single if each_has_all else self)._act(lifecycle, progress, batches, handing_over)
            if not sharded:
                mend(self.module, team)
            return
        rank_zero_info(f"rank 0 calibrates alone, as {', '.join(alone)} must see all batches; {team.size - 1} wait")

        def act() -> dict[str, Any]:
            single._act(lifecycle, progress, single._batches(lifecycle), handing_over)
            self.sample = single.sample
            return lifecycle.state_dict() if handing_over else {}

        state = self.run.preemption.result(act, "calibration")
        if handing_over:
            send_weights(team, self.module)
            if team.rank:
                lifecycle.weights_loaded(state)
        else:
            share(self.module, self.pl_module.device, team)

    def _single(self) -> "PostTraining":
        """The same, for a rank that shares no work."""
        return PostTraining(**{**vars(self), "state": self.state.but(team=Team())})

    def _act(
        self, lifecycle: Lifecycle, progress: ProgressReport, batches: Sequence[Any] | None, handing_over: bool
    ) -> None:
        options, outputs = self.run.options.calibration, self.run.outputs
        options = options if outputs is None else options.cached_in(outputs.report.parent)
        log = nullcontext(NoLog()) if handing_over else self._opened_log(lifecycle)  # if it hands over, it trains on
        with (
            self._precision(as_trained=self._calibrates_as_trained),
            self._marked(),
            log as group_log,
            block_by_block(self.trainer, self.pl_module, self.module, options) as residence,
        ):
            calibrate(
                lifecycle,
                self.state.but(user_loss=partial(training_loss, self.trainer, self.pl_module, options.seed)),
                batches,
                options,
                clock=self.event,
                forward=forward_of(self.pl_module, batches or []),
                progress=lambda text, blocks, of: progress("calibration", blocks, of, text),
                log=group_log,
                residence=residence,
            )

    def _marked(self) -> AbstractContextManager[None]:
        return marked_when_interrupted(self.module, lambda: len(self.state.ledger))

    def _shares(self, lifecycle: Lifecycle, sharded: bool, alone: bool) -> list[tuple[Sequence[Any] | None, bool]]:
        """Calibration batches for each rank: the first one, for the probe, and its own; and whether each gets all.

        Each call of a sharded block takes all ranks: where they cannot have equal numbers of batches, each gets all.
        """
        team, batches = self.run.team, self._batches(lifecycle)
        each_has_all = sharded and (alone or len(batches or ()) % team.size > 0)
        if batches is None or team.alone or each_has_all:
            return [(batches, each_has_all)] * team.size
        numbers = [{0, *replace(team, rank=rank).mine(len(batches))} for rank in range(team.size)]
        return [([batch if i in wanted else None for i, batch in enumerate(batches)], False) for wanted in numbers]

    def _opened_log(self, lifecycle: Lifecycle) -> AbstractContextManager[GroupLog]:
        """The log in the run's folder; another model or data than its own, as after more training, replace it."""
        outputs, names = self.run.outputs, unable(lifecycle.modifiers)
        if names:
            logger.info("after a kill the calibration begins anew: no group_state in %s", ", ".join(names))
        folder = None if outputs is None or names else outputs.log
        team = self.run.team if shards(self.trainer) else None
        return opened(folder, self.run.options.resume, replaces=True, interrupt=self.run.preemption.check, team=team)

    def _batches(self, lifecycle: Lifecycle) -> Sequence[Any] | None:
        """Calibration batches; None where no modifier uses data."""
        if not any(m.needs.data for m in lifecycle.modifiers):
            return None
        calibration = self.run.calibration
        if calibration is None:
            calibration = calibration_batches(self.trainer, self.pl_module, self.run.options, self.run.own_batches)
        if self.run.options.on_gate == "promote":
            self.run.calibration = calibration  # a loader may give other batches the next time
        batches, samples = calibration
        self.run.facts |= {"calibration_batches": len(batches), "calibration_samples": samples}
        if not hasattr(self.pl_module, "calibration_step"):
            check_batch(self.module, batches[0], IN_TRAINER)  # again: perhaps nothing was trained
        self.sample = batches[0]
        return batches

    def _precision(self, as_trained: bool = False) -> AbstractContextManager[Any]:
        """Half precision runs as in training, and so does mixed precision ``as_trained``, else without autocast."""
        plugin = self.trainer.precision_plugin
        is_plain = isinstance(plugin, MixedPrecision) and not as_trained
        return nullcontext() if is_plain else plugin.forward_context()

    @property
    def _calibrates_as_trained(self) -> bool:
        """Whether autocast is on: on a GPU float32 products take ten times as long, and are not the trained model's."""
        precision = self.run.options.calibration.calibration_precision
        return precision == "trained" or (precision == "auto" and self.pl_module.device.type == "cuda")
