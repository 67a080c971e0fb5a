"""The end of a run: best weights, metric, calibration, metric again, export, report, and a checkpoint that tests use.

Every rank runs this. Both measurements are shared by all ranks; calibration and everything that is written is the work
of rank 0, and the others wait and then receive the weights.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_compress.calibration.activations import BatchRunner
from lightning_compress.calibration.inputs import IN_TRAINER, check_batch, run_model
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.calibration.training_end import end_training
from lightning_compress.core.events import Event
from lightning_compress.core.interruption import marked_when_interrupted
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.state import State
from lightning_compress.distributed import world_size
from lightning_compress.export import verify
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.export.save import save
from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized
from lightning_compress.report import plots, summary, table
from lightning_compress.training.broadcast import share, ties
from lightning_compress.training.checks import tensor_bytes
from lightning_compress.training.evaluation import Measurement, batches_of, compare, evaluate
from lightning_compress.training.memory import peak_memory_bytes
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.outputs import Outputs
from lightning_compress.training.progress import ProgressReport
from lightning_compress.training.pruned_checkpoints import same_shapes
from lightning_compress.training.rank_zero import alone, send_tensors
from lightning_compress.training.samples import OwnBatches, SideBySide, first_batches, seeded_view, share_of
from lightning_compress.training.saved_files import SavedFiles
from lightning_compress.training.submodule import is_compiled

__all__ = ["Finish", "check_best", "is_resumed", "processors"]


def processors(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """What lies beside the model: attributes of the datamodule or of the LightningModule that can be saved.

    A processor comes last: it holds a tokenizer and an image processor of its own, and its files count.
    """
    exported = []
    for name in ("feature_extractor", "image_processor", "tokenizer", "processor"):
        candidates = [getattr(owner, name, None) for owner in (trainer.datamodule, pl_module)]
        savable = [c for c in candidates if hasattr(c, "save_pretrained") and not isinstance(c, nn.Module)]
        exported += savable[:1]
    return exported


def check_best(trainer: Trainer, options: CallbackOptions, lifecycle: Lifecycle, saved_files: SavedFiles) -> None:
    """ValueError when the best checkpoint will hold weights without the scales that they were trained with.

    Warns when a resumed run's best so far will not be opened at its end.
    """
    bare = [c for c in _model_checkpoints(trainer) if c.monitor and c.save_weights_only] if options.load_best else []
    for modifier in lifecycle.modifiers if bare else ():
        if modifier.needs.checkpoint_state:
            raise ValueError(
                f"ModelCheckpoint(monitor={bare[0].monitor!r}, save_weights_only=True) keeps the best weights without "
                f"what {modifier.name} has learned beside them: leave save_weights_only out, or compress the last "
                f"weights with load_best=False"
            )
    for best in _best_checkpoints(trainer)[:1] if options.load_best else ():
        if saved_files.will_refuse(best.best_model_path):
            rank_zero_warn(
                f"the best checkpoint so far, {best.best_model_path}, was saved by another process and holds more than "
                f"tensors and plain values, so it will not be opened: unless this run saves a better one, it ends with "
                f"an error before it compresses; to compress the last weights set load_best=False"
            )


def _best_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those that have kept a best one by a metric."""
    return [c for c in _model_checkpoints(trainer) if c.monitor and c.best_model_path]


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def is_resumed(trainer: Trainer) -> bool:
    """Whether the user resumed this run; Lightning's tuner resumes too, from a checkpoint that it has just written."""
    path = trainer.ckpt_path
    return path is not None and not Path(path).name.startswith((".lr_find", ".scale_batch_size"))


@dataclass
class Finish:
    """One end of one run.

    Args:
        trainer: After training, before its teardown (or after it, when no training took place).
        pl_module: The LightningModule.
        lifecycle: Its modifiers, initialized.
        state: With the model that is compressed.
        options: The callback's arguments.
        recipe: As primitives, for the export.
        clock: An event dated now.
        saved_files: The checkpoint files that this process saved.
        outputs: Where to write; None: into a folder that is then deleted.
        run: The name of the run.
        clock_state: The callback's clock as numbers; with ``run`` it says which end of which run this is.
        own_batches: Of the user's ``calibration_dataloader``; kept by the callback, as the first is looked at early.
    """

    trainer: Trainer
    pl_module: LightningModule
    lifecycle: Lifecycle
    state: State
    options: CallbackOptions
    recipe: dict[str, Any]
    clock: Event
    saved_files: SavedFiles
    outputs: Outputs | None
    run: str
    clock_state: dict[str, Any]
    own_batches: OwnBatches = field(default_factory=OwnBatches)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    ties_before: int = 0
    sample: Any = None

    @property
    def module(self) -> nn.Module:
        assert self.state.model is not None
        return self.state.model

    def compress(self) -> None:
        """Load the best weights, measure, calibrate, finalize, measure."""
        self.ties_before = ties(self.module)
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(self.trainer, self.pl_module, "fit")  # else it is live until fit ends, and draws over ours
        shown = self.trainer.is_global_zero and bar is not None
        with self._undisturbed(), ProgressReport(shown) as progress:
            with self._timed("load best"):
                path, saved = alone(self._load_best, "loading the best checkpoint")
                self.facts["best_checkpoint"] = path
                if path:
                    send_tensors(self.pl_module)
                self.lifecycle.weights_loaded(saved)
            before = self._measure("metric before", progress)
            with self._timed("calibration"):
                alone(lambda: self._act_after_training(progress), "calibration")
                share(self.module, self.pl_module.device)
            self.lifecycle.finalize(self.state)
            after = self._measure("metric after", progress)
            self.facts |= compare(before, after, self._summing_device())
        guard_save_pretrained(self.module)
        self._warn_of_what_stays_behind()
        self._forget_compiled()

    def measure_dense(self) -> None:
        """Before a window opens: the metric of the model as training has made it so far; every rank calls this."""
        with self._undisturbed():
            values = self._measure("metric dense", ProgressReport(shown=False)).values
        if values:
            self.facts["metric_dense"] = {"step": self.clock.global_step, "values": values}

    def check_input(self, batch: Any) -> None:
        """Compare what will calibrate with the model's ``forward``, as the first training batch begins; it is not run.

        Args:
            batch: A training batch as the model gets it; a ``calibration_dataloader`` is asked for one of its own.

        Raises:
            ValueError: The model cannot take it.
        """
        needy = any(m.needs.data for m in self.lifecycle.modifiers)
        if needy:
            alone(lambda: self._check_input(batch), "looking at the first calibration batch")

    def _check_input(self, batch: Any) -> None:
        with self._undisturbed():
            own = self.own_batches.first(self._owners())
            batches = [batch] if own is None else [self._to_device(b) for b in own]
        if not batches:
            raise ValueError("the calibration loader is empty, expected at least one batch")
        if not hasattr(self.pl_module, "calibration_step") and not isinstance(batches[0], Iterator):
            check_batch(self.module, batches[0], IN_TRAINER)

    def hand_over(self) -> None:
        """In the midst of training: calibrate those of ``lifecycle`` that others go on from; every rank calls this."""
        with self._undisturbed():
            with self._timed("calibration"):
                state = alone(lambda: self._calibrated(self.lifecycle), "calibration")
                send_tensors(self.module)
            if not self.trainer.is_global_zero:
                self.lifecycle.weights_loaded(state)
        for modifier in self.lifecycle.modifiers:
            modifier.note_handed_over()
        self._forget_compiled()

    def _calibrated(self, lifecycle: Lifecycle) -> dict[str, Any]:
        batches = self._batches_for(lifecycle)
        with self._precision(), marked_when_interrupted(self.module, lambda: len(self.state.ledger)):
            self._calibrate(lifecycle, batches, ProgressReport(shown=False))
        return lifecycle.state_dict()

    def _forget_compiled(self) -> None:
        if is_compiled(self.pl_module):
            torch.compiler.reset()  # compiled code does not see hooks that came later: compile it anew

    def leave(self) -> None:
        """Write ``compressed.ckpt``, then the export, then the report; every rank calls this.

        In this order, so that what fails costs none of what was computed: the checkpoint needs nothing but room, and
        the export has only data from it. A report, a figure or a logger that fails is a warning.
        """
        failure = None
        try:
            self._promote()
        except Exception as error:
            if world_size() > 1:
                raise  # the other ranks still wait in it
            failure = error
        with ExitStack() as stack:
            outputs = self.outputs
            if outputs is None:
                root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                outputs = Outputs(root / "compressed", root / "report", root / "compressed.ckpt")
            alone(lambda: self._write(outputs), "the export")
        if failure is not None:
            raise failure

    def _promote(self) -> None:
        """Save ``compressed.ckpt``, and make it what ``ckpt_path="best"`` means."""
        if self.outputs is None:
            return
        path = self.outputs.checkpoint
        pointed = self.trainer.checkpoint_callback
        note = f"the compressed model, weights stored dense, is in {path}"
        if isinstance(pointed, ModelCheckpoint):
            before, pointed.best_model_path = pointed.best_model_path, str(path)  # also for who resumes from it
            note += f', which ckpt_path="best" now means{f" (it was {before})" if before else ""}'
        self.trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(note)

    # -- around it ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Afterwards the random state and the Trainer's stage are what they were; no autocast, no gradients inside."""
        stage = self.trainer.state.stage
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(self.trainer.strategy.root_device.type, enabled=False))
            stack.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            torch.manual_seed(self.options.calibration.seed)
            self.trainer.state.stage = RunningStage.VALIDATING  # augmentation asks for trainer.training
            try:
                yield
            finally:
                self.trainer.state.stage = stage

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    # -- best weights -------------------------------------------------------------------------------------------------

    def _load_best(self) -> tuple[str | None, dict[str, Any]]:
        """The path that was loaded and the modifiers' state of then; None when no ModelCheckpoint follows a metric."""
        monitored = _best_checkpoints(self.trainer)
        if not self.options.load_best or not monitored:
            return None, {}
        best = monitored[0]
        read = self.saved_files.read(best.best_model_path, self.trainer)
        keys = {c.state_key for c in self.trainer.callbacks if getattr(c, "lifecycle", None) is self.lifecycle}
        states = [state for key, state in read.get("callbacks", {}).items() if key in keys]
        if states and states[0].get("run", self.run) != self.run:
            rank_zero_warn(
                f"the best checkpoint by {best.monitor!r}, {best.best_model_path}, was overwritten by another run, so "
                f"that the last weights are compressed instead: give each run a folder of its own for its checkpoints"
            )
            return None, {}
        if not same_shapes(read["state_dict"], self.pl_module):
            rank_zero_warn(
                f"the best checkpoint by {best.monitor!r}, {best.best_model_path}, was saved before the model "
                f"had shrunk to its shapes of now; the last weights are compressed instead: shrink earlier, or set "
                f"load_best=False"
            )
            return None, {}
        self.pl_module.load_state_dict(read["state_dict"], strict=self.pl_module.strict_loading)
        score = "" if best.best_model_score is None else f", {float(best.best_model_score):.6g}"
        rank_zero_info(f"compressing the best weights by {best.monitor!r}{score}, from {best.best_model_path}")
        return best.best_model_path, states[0]["modifiers"] if states else {}

    # -- metric -------------------------------------------------------------------------------------------------------

    def _measure(self, phase: str, progress: ProgressReport) -> Measurement:
        if not self.options.evaluate:
            return Measurement()
        loaders, limits = self._validation_loaders()
        with self._timed(phase):
            return evaluate(
                self.pl_module,
                self.module,
                batches_of(loaders, limits, self._to_device),
                forward=partial(run_model, advice=IN_TRAINER),
                context=self.trainer.precision_plugin.val_step_context,
                monitor=next((c.monitor for c in _model_checkpoints(self.trainer) if c.monitor), None),
                device=self._summing_device(),
                progress=lambda done: progress(phase, done, sum(n or 0 for n in limits)),
            )

    def _validation_loaders(self) -> tuple[list[Any], list[int | None]]:
        """Loaders, and how many batches of each count."""
        trainer = self.trainer
        loop = trainer.fit_loop.epoch_loop.val_loop
        if trainer.val_dataloaders is None and loop._data_source.is_defined():
            loop.setup_data()  # no validation has run; the loop knows all the ways to a loader
        loaders = trainer.val_dataloaders
        source = trainer.datamodule if trainer.datamodule is not None else self.pl_module
        if loaders is None and trainer.limit_val_batches != 0 and is_overridden("val_dataloader", source):
            loaders = tree_map(self._share_of, source.val_dataloader())  # a language model needs no validation_step
        known = [int(n) if n != float("inf") else None for n in loop.max_batches]
        if trainer.val_dataloaders is not None and not loop._is_sequential:  # a batch holds one of every loader
            assert loop._combined_loader is not None
            loaders = SideBySide(loop._combined_loader)
            known = [None if None in known else max(n or 0 for n in known)]
        listed = list(loaders.values()) if isinstance(loaders, dict) else loaders
        listed = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
        if not listed:
            rank_zero_info("no validation loader: the report will have no metric before and after")
        limits = known if len(known) == len(listed) else [None] * len(listed)
        cap = 1 if trainer.fast_dev_run else self.options.eval_batches
        sizes = [sized_len(loader) for loader in listed]
        limits = [size if limit is None else limit for limit, size in zip(limits, sizes, strict=True)]
        return list(listed), [cap if n is None else n if cap is None else min(n, cap) for n in limits]

    def _share_of(self, loader: Any) -> Any:
        return share_of(loader, self.trainer.global_rank, self.trainer.world_size)

    def _to_device(self, batch: Any, loader: int = 0) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=loader)

    def _summing_device(self) -> torch.device:
        """Where ranks add up; alone on the CPU, since MPS has no float64."""
        return self.trainer.strategy.root_device if world_size() > 1 else torch.device("cpu")

    # -- calibration --------------------------------------------------------------------------------------------------

    def _act_after_training(self, progress: ProgressReport) -> None:
        lifecycle = self.lifecycle.after_training
        batches = self._batches_for(lifecycle)
        with self._precision(), marked_when_interrupted(self.module, lambda: len(self.state.ledger)):
            end_training(self.lifecycle, self.state, self.clock)
            if any(m.needs.calibration for m in lifecycle.modifiers):
                self._calibrate(lifecycle, batches, progress)

    def _batches_for(self, lifecycle: Lifecycle) -> list[Any] | None:
        modifiers = lifecycle.modifiers
        batches = self._calibration_batches() if any(m.needs.data for m in modifiers) else None
        if batches and not hasattr(self.pl_module, "calibration_step"):
            check_batch(self.module, batches[0], IN_TRAINER)  # again: perhaps nothing was trained
        self.sample = batches[0] if batches else None
        return batches

    def _calibrate(self, lifecycle: Lifecycle, batches: list[Any] | None, progress: ProgressReport) -> None:
        calibrate(
            lifecycle,
            self.state,
            batches,
            self.options.calibration,
            clock=self.clock,
            forward=self._forward(batches or []),
            progress=lambda text, done, total: progress("calibration", done, total, text),
        )

    def _calibration_batches(self) -> list[Any]:
        """Batches as the model gets them, kept on the offload device."""
        wanted = 1 if self.trainer.fast_dev_run else self.options.calibration_batches
        own = self.own_batches.loader(self._owners())
        if own is not None:
            loader, which = own, "the first of calibration_dataloader()"
        else:
            loader, which = seeded_view(self._train_loader(), wanted, self.options.calibration.seed)
        batches = [self._offloaded(self._to_device(batch)) for batch in first_batches(loader, wanted)]
        if not batches:
            raise ValueError("the calibration loader is empty, expected at least one batch")
        if len(batches) < wanted:
            rank_zero_warn(f"calibration_batches={wanted}, but the loader gave {len(batches)}; calibrating on those")
        rank_zero_info(f"calibrating on {len(batches)} batches: {which}")
        self.facts |= {"calibration_batches": len(batches), "calibration_samples": which}
        return batches

    def _owners(self) -> tuple[Any, ...]:
        """Who may have a ``calibration_dataloader``."""
        return self.trainer.datamodule, self.pl_module

    def _offloaded(self, batch: Any) -> Any:
        """Batches for a ``calibration_step`` stay on the device: their tensors tell it which batch they are."""
        device = self.options.calibration.offload_device
        if device is None or hasattr(self.pl_module, "calibration_step"):
            return batch
        return tree_map_only(Tensor, lambda t: t.to(device), batch)

    def _train_loader(self) -> Any:
        trainer = self.trainer
        if trainer.train_dataloader is not None:
            return trainer.train_dataloader
        source = trainer.fit_loop._data_source  # limit_train_batches=0: Lightning asks nobody for a loader
        if not source.is_defined():
            raise ValueError(
                "this recipe calibrates on data, and there is neither a calibration_dataloader() on the datamodule "
                "nor a training loader; give one of them to the Trainer"
            )
        return source.dataloader()

    def _forward(self, batches: Sequence[Any]) -> Callable[[nn.Module, Any], Any]:
        """The user's ``calibration_step(batch, batch_idx)``, or the default way into the model."""
        step = getattr(self.pl_module, "calibration_step", None)
        if step is None:
            return partial(run_model, advice=IN_TRAINER)
        index = {_first_tensor(batch): i for i, batch in enumerate(batches)}
        return lambda module, batch: step(batch, index.get(_first_tensor(batch), 0))

    def _precision(self) -> AbstractContextManager[Any]:
        """Half precision runs as in training; mixed precision has float32 weights and calibrates in float32."""
        plugin = self.trainer.precision_plugin
        return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context()

    def _warn_of_what_stays_behind(self) -> None:
        """Spawned workers send back weights and nothing else."""
        beside = self._beside_weights()
        self.facts["beside_weights"] = list(beside)
        launcher = type(self.trainer.strategy.launcher)
        if not any(c.__name__ == "_MultiProcessingLauncher" for c in launcher.__mro__):
            return
        if ties(self.module) < self.ties_before:
            beside.append("that weights were untied (both get the values of one)")
        if beside:
            rank_zero_warn(
                f"the main process gets the compressed weights back from its workers, but not {', nor '.join(beside)}; "
                f"what is exported has all: load(folder, model) before testing"
            )

    def _beside_weights(self) -> list[str]:
        """What the model has and its weights do not hold."""
        schemes = [record.scheme for _, record in Quantized.find(self.module).values()]
        held = {
            "the quantization of activations": any(scheme.input_activations is not None for scheme in schemes),
            "the quantization of the KV cache": bool(QuantizedCache.find(self.module)),
            "the rotations that run beside modules": bool(OnlineRotations.find(self.module)),
        }
        return [what for what, is_there in held.items() if is_there]

    # -- what is left behind ------------------------------------------------------------------------------------------

    def _write(self, outputs: Outputs) -> None:
        try:
            with self._timed("export"):
                self._export(outputs.export)
            if "export_dir" in self.facts:
                self._verify(outputs.export)
        finally:
            self.facts |= self._summary()
            ledger, folder = self.state.ledger, outputs.report
            with _as_warning("the report"):
                summary.write(folder, ledger, self.facts)
            with _as_warning("the figure"):
                plots.error_per_module(ledger, folder / "error_per_module.png", summary.headline(self.facts))
            with _as_warning("the table"):
                table.show(ledger, self.facts)
            self._log()

    def _export(self, folder: Path) -> None:
        origin = {"run": self.run, "clock": self.clock_state}
        again = is_resumed(self.trainer)
        beside = processors(self.trainer, self.pl_module)
        try:
            save(self.module, folder, tokenizer=beside, recipe=self.recipe, overwrite=again, origin=origin)
            if self.outputs is not None:  # else that folder is deleted
                self.facts["export_dir"] = str(folder)
        except Exception as error:
            if Quantized.find(self.module) or not isinstance(error, ValueError):
                error.add_note("the compressed model, weights stored dense, is in compressed.ckpt")
                raise
            rank_zero_warn(f"nothing is exported, and compressed.ckpt alone holds the model: {error}")

    def _verify(self, folder: Path) -> None:
        """Let plain transformers answer one batch from the folder; other answers than the model's are a warning."""
        if not verify.is_wanted(self.module, folder, self.options.verify):
            return
        with self._undisturbed(), self._timed("verify"):
            forward = self._forward([] if self.sample is None else [self.sample])
            runner = BatchRunner(self.module, forward)
            run = None if self.sample is None else (lambda: runner(self.sample))
            gap, fault = verify.answers(self.module, folder, run)
        self.facts["verify"] = {"difference": gap, "fault": fault}
        if fault:
            rank_zero_warn(fault)

    def _summary(self) -> dict[str, Any]:
        sums = summary.totals(self.state.ledger)
        saved = (sums["bytes_before"] or 0) - (sums["bytes_after"] or 0) if sums["bytes_after"] is not None else 0
        files = list(Path(self.facts["export_dir"]).glob("*.safetensors")) if "export_dir" in self.facts else []
        on_disk = sum(file.stat().st_size for file in files) or None
        device = self.trainer.strategy.root_device
        return {
            "model": type(self.module).__name__,
            "model_bytes_after": on_disk or tensor_bytes(self.module) - saved,
            "recipe": self.options.recipe_name or self.recipe,
            "modifiers": self.recipe["modifiers"],
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}),
            "seed": self.options.calibration.seed,
            "global_step": self.clock.global_step,
        }

    def _log(self) -> None:
        """``pl_module.log`` is not allowed here; loggers are."""
        sums = summary.totals(self.state.ledger) | {n: v for n, v in self.facts.items() if n.startswith("model_bytes")}
        scalars = {name: value for name, value in sums.items() if isinstance(value, int | float)}
        scalars |= {f"seconds/{phase.replace(' ', '_')}": spent for phase, spent in self.seconds.items()}
        for name, entry in self.facts["metric"].items():
            scalars |= {f"{name}_before": entry["before"], f"{name}_after": entry["after"]}
        finite = {f"compress/{name}": value for name, value in scalars.items() if math.isfinite(value)}
        for logger in self.trainer.loggers:
            with _as_warning(f"what {type(logger).__name__} logs of it"):
                logger.log_metrics(finite, step=self.trainer.global_step)
                logger.save()


@contextmanager
def _as_warning(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{what} is not complete, while the compressed model is: {type(error).__name__}: {error}")


def _first_tensor(batch: Any) -> int | None:
    """The identity of a batch: that of its first tensor, which moving to the device where it lies does not change."""
    return next((id(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
