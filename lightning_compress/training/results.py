"""What a run leaves behind: ``compressed.ckpt``, the exported folder, the report, and numbers for the loggers."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.calibration.activations import BatchRunner
from lightning_compress.core.events import Event
from lightning_compress.core.state import State
from lightning_compress.export import verify
from lightning_compress.export.contents import Stored
from lightning_compress.export.gguf.write import FILE, write_gguf
from lightning_compress.export.hugging_face import is_transformers
from lightning_compress.export.onnx.sample import recorded_call
from lightning_compress.export.onnx.write import OnnxFile, write_onnx
from lightning_compress.export.save import dump_yaml, saved_model, write_compressed_tensors
from lightning_compress.export.sharded import gathered_on
from lightning_compress.files.atomic_folder import origin_of
from lightning_compress.layers.memory import peak_memory_bytes
from lightning_compress.quant.record import Quantized
from lightning_compress.report import page, plots, summary, table
from lightning_compress.resume.folder_log import remove as remove_log
from lightning_compress.training import trackers
from lightning_compress.training.checks import tensor_bytes
from lightning_compress.training.failures import as_warning
from lightning_compress.training.gate import gate_failures
from lightning_compress.training.hub import push
from lightning_compress.training.loaders import calibration_batches, forward_of
from lightning_compress.training.outputs import Outputs
from lightning_compress.training.random_state import undisturbed
from lightning_compress.training.resume import is_resumed
from lightning_compress.training.run import Run
from lightning_compress.training.sharding import reshard_between, shards

__all__ = ["Results", "processors"]


def processors(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Attributes of the datamodule or of the LightningModule that are saved with the model.

    A processor comes last: it holds a tokenizer and an image processor of its own, and its files count.
    """
    exported = []
    for name in ("feature_extractor", "image_processor", "tokenizer", "processor"):
        candidates = [getattr(owner, name, None) for owner in (trainer.datamodule, pl_module)]
        savable = [c for c in candidates if hasattr(c, "save_pretrained") and not isinstance(c, nn.Module)]
        exported += savable[:1]
    return exported


@dataclass(frozen=True)
class Results:
    """The files of a compressed model.

    ``clock_state``, the callback's clock as numbers, and the run's name identify the exported model; ``sample`` is a
    calibration batch, None for recipes that use no data.
    """

    trainer: Trainer
    pl_module: LightningModule
    state: State
    run: Run
    event: Event
    clock_state: dict[str, Any]
    sample: Any = None

    @property
    def module(self) -> nn.Module:
        assert self.state.model is not None
        return self.state.model

    def write(self) -> None:
        """Write ``compressed.ckpt``, then the export, then the report; every rank calls this.

        A failure costs no other file: the checkpoint needs nothing but space, and the export and the report are written
        even if it fails. A failure of the report, a figure or a logger is a warning.
        """
        failure = None
        try:
            self._save_checkpoint()
        except Exception as error:
            if not self.run.team.alone:
                raise  # the other ranks still wait in it
            failure = error
        with ExitStack() as stack:
            outputs = self.run.outputs
            if outputs is None:
                root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                formats = self.run.options.formats
                outputs = Outputs(root / "compressed", root / "report", root / "compressed.ckpt", formats=formats)
            if shards(self.trainer):
                call = self._call() if self.run.options.verify else None
                stored = stack.enter_context(self._gathered(outputs.export.parent))
            else:
                call, stored = None, {}
            work = partial(self._write, outputs, stored, call)
            self.run.preemption.result(work, "the export", at_once=True)
        if failure is not None:
            raise failure

    @contextmanager
    def _gathered(self, folder: Path) -> Iterator[Stored]:
        """Inside, a sharded model is whole on rank zero; where that fails, all ranks hear of it."""
        try:
            with gathered_on(self.module, self.trainer.is_global_zero, folder) as stored:
                yield stored
        except Exception as error:
            self.run.team.fail(error)
            raise

    def _save_checkpoint(self) -> None:
        """Save ``compressed.ckpt``, and let ``ckpt_path="best"`` mean it."""
        if self.run.outputs is None:
            return
        path = self.run.outputs.checkpoint
        callback = self.trainer.checkpoint_callback
        note = f"the compressed model, weights stored dense, is in {path}"
        if isinstance(callback, ModelCheckpoint):
            before, callback.best_model_path = callback.best_model_path, str(path)  # stored in the checkpoint, too
            note += f', which ckpt_path="best" now means{f" (it was {before})" if before else ""}'
        self.trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(note)

    def _write(self, outputs: Outputs, stored: Stored, call: Mapping[str, Any] | None) -> None:
        facts = self.run.facts
        try:
            with self.run.timed("export"):
                for name, folder in outputs.folders.items():
                    self._export(name, folder, stored)
            remove_log(outputs.log)
            if "export_dir" in facts and "compressed_tensors" in outputs.formats:
                self._verify(outputs.export, call)
        finally:
            facts |= self._summary()
            ledger, folder = self.state.ledger, outputs.report
            earlier = trackers.file_versions(folder)
            with as_warning("the report"):
                summary.write(folder, ledger, facts)
            with as_warning("the page"):
                page.write(folder, ledger, facts)
            with as_warning("the figure"):
                plots.error_per_module(ledger, folder / "error_per_module.png", summary.headline(facts))
            with as_warning("the table"):
                table.show(ledger, facts)
            with as_warning("the log"):
                files = trackers.written_since(folder, earlier)
                trackers.log(self.trainer.loggers, trackers.Outcome(ledger, facts, files, self.trainer.global_step))
            if (hub := self.run.options.target) is not None and "export_dir" in facts:
                push(Path(facts["export_dir"]), hub, failed=bool(gate_failures(facts)))

    def _export(self, format: str, folder: Path, stored: Stored) -> None:
        origin: dict[str, Any] = {"run": self.run.name, "clock": self.clock_state}
        if "SLURM_JOB_ID" in os.environ:  # an attempt without a checkpoint knows its run by it
            origin["job"] = os.environ["SLURM_JOB_ID"]
        if metric := self.run.facts.get("metric"):
            origin["metric"] = {name: _finite(entry) for name, entry in metric.items()}
        if failures := gate_failures(self.run.facts):
            origin["gate"] = [entry["text"] for entry in failures]
        replaces = is_resumed(self.trainer) or origin_of(folder).get("run") == self.run.name
        tokenizers = processors(self.trainer, self.pl_module)
        try:
            if format == "onnx":
                file = self._write_onnx(folder, processors=tokenizers, overwrite=replaces, origin=origin)
                self.run.facts["onnx"] = {"file": str(file.path), "bytes": file.size, "difference": file.difference}
            elif format == "gguf":
                path = write_gguf(
                    saved_model(self.module),
                    folder,
                    processors=tokenizers,
                    recipe_yaml=dump_yaml(self.run.recipe),
                    overwrite=replaces,
                    origin=origin,
                )
                self.run.facts["gguf"] = {"file": str(path / FILE), "bytes": (path / FILE).stat().st_size}
            else:
                write_compressed_tensors(
                    self.module,
                    folder,
                    tokenizer=tokenizers,
                    recipe=self.run.recipe,
                    overwrite=replaces,
                    origin=origin,
                    stored=stored,
                )
            if self.run.outputs is not None:  # otherwise that folder is deleted
                self.run.facts.setdefault("export_dir", str(folder))
        except Exception as error:
            if Quantized.find(self.module) or not isinstance(error, ValueError):
                error.add_note("the compressed model, weights stored dense, is in compressed.ckpt")
                raise
            rank_zero_warn(f"nothing is exported, and compressed.ckpt alone holds the model: {error}")

    def _write_onnx(self, folder: Path, **arguments: Any) -> OnnxFile:
        """The ONNX file, traced on a calibration batch, which is loaded now for recipes without calibration."""
        options = self.run.options
        with undisturbed(self.trainer, options.calibration.seed):
            batch = self.sample
            if batch is None:
                batch = calibration_batches(self.trainer, self.pl_module, options, self.run.own_batches)[0][0]
            runner = BatchRunner(self.module, forward_of(self.pl_module, [batch]))
            call = recorded_call(self.module, lambda: runner(batch))
            recipe_yaml = dump_yaml(self.run.recipe)
            return write_onnx(saved_model(self.module), folder, sample=call, recipe_yaml=recipe_yaml, **arguments)

    def _call(self) -> dict[str, Any] | None:
        """The call that verifies a sharded model, which all ranks make; None where it is not of transformers."""
        if not is_transformers(self.module):
            return None
        with undisturbed(self.trainer, self.run.options.calibration.seed):
            call = verify.recorded_call(self.module, self._answer())
        reshard_between(self.trainer, self.module)
        return call

    def _answer(self) -> Callable[[], Any] | None:
        """Runs the model on the sample; None where there is none."""
        if self.sample is None:
            return None
        runner = BatchRunner(self.module, forward_of(self.pl_module, [self.sample]))
        return lambda: runner(self.sample)

    def _verify(self, folder: Path, call: Mapping[str, Any] | None) -> None:
        """Let plain transformers answer one batch from the folder; warn where its answers differ from the model's."""
        options = self.run.options
        if not verify.is_wanted(self.module, folder, options.verify):
            return
        with undisturbed(self.trainer, options.calibration.seed), self.run.timed("verify"):
            gap, fault = verify.answers(self.module, folder, self._answer(), call)
        self.run.facts["verify"] = {"difference": gap, "fault": fault}
        if fault:
            rank_zero_warn(fault)

    def _summary(self) -> dict[str, Any]:
        run, sums = self.run, summary.totals(self.state.ledger)
        saved = (sums["bytes_before"] or 0) - (sums["bytes_after"] or 0) if sums["bytes_after"] is not None else 0
        files = list(Path(run.facts["export_dir"]).glob("*.safetensors")) if "export_dir" in run.facts else []
        on_disk = sum(file.stat().st_size for file in files) or next(
            (run.facts[f]["bytes"] for f in ("onnx", "gguf") if f in run.facts), None
        )
        device = self.trainer.strategy.root_device
        return {
            "model": type(self.module).__name__,
            "model_bytes_after": on_disk or tensor_bytes(self.module) - saved,
            "recipe": run.options.recipe_name or run.recipe,
            "modifiers": run.recipe["modifiers"],
            "seconds": run.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}),
            "seed": run.options.calibration.seed,
            "global_step": self.event.global_step,
        }


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """None for numbers that JSON cannot hold."""
    return {key: value if value is not None and math.isfinite(value) else None for key, value in entry.items()}
