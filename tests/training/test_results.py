"""Files and numbers that a run leaves behind, and that a failure of one costs no other."""

import json
import math
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet, rounding


def test_scalars_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    quiet(tmp_path, rounding(), logger=loggers).fit(Regression(), Sums())
    for logger in loggers:
        header = (next((tmp_path / logger.name).glob("*/metrics.csv"))).read_text().splitlines()[0]
        assert "compress/val/mse_before" in header
        assert "compress/val/mse_after" in header


class Processor:
    """Writes files of its name, as tokenizers and processors do."""

    def __init__(self, *names):
        self.names = names

    def save_pretrained(self, folder):
        for name in self.names:
            Path(folder, f"{name}.json").write_text(str(self.names))


def test_processors_are_exported_as_well_as_tokenizers(tmp_path):
    module, data = Regression(), Sums()
    data.tokenizer, module.tokenizer = Processor("tokenizer"), Processor("passed over")
    module.processor, module.feature_extractor = Processor("processor", "tokenizer"), nn.Linear(1, 1)
    module.image_processor = Processor("preprocessor_config")
    quiet(tmp_path, rounding()).fit(module, data)
    names = {path.name: path.read_text() for path in (tmp_path / "compressed").glob("*.json")}
    assert names.keys() == {
        "config.json", "export_manifest.json", "processor.json", "tokenizer.json", "preprocessor_config.json"
    }  # fmt: skip
    assert names["tokenizer.json"] == "('processor', 'tokenizer')"  # the processor's own counts


class Strict(Logger):
    """Raises on a step that falls, on a value that is not finite, and on anything after its end."""

    name, version = "strict", 0

    def __init__(self):
        super().__init__()
        self.rows, self.ended = [], False

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        assert not self.ended
        assert step >= max((s for s, _ in self.rows), default=0)
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        self.rows.append((step, metrics))

    def finalize(self, status):
        self.ended = True


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


REPORTING = ["report.summary.write", "report.plots.error_per_module", "report.table.show", "logger"]


@pytest.mark.parametrize("fails", REPORTING)
def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, fails):
    first, second = Strict(), Strict()
    if fails == "logger":

        def log(metrics, step):
            return full_disk() if "compress/modules" in metrics else None

        monkeypatch.setattr(first, "log_metrics", log)
    else:
        monkeypatch.setattr(f"lightning_compress.{fails}", full_disk)
    with pytest.warns(UserWarning, match=r"is not complete, while the compressed model is: OSError.*No space left"):
        quiet(tmp_path, rounding(), logger=[first, second]).fit(Regression(), Sums())
    assert {"compressed", "compressed.ckpt"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report" / "summary.json").exists() == (fails != "report.summary.write")
    assert any("compress/val/mse_after" in metrics for _, metrics in second.rows)


def test_an_export_that_fails_leaves_checkpoint_and_report(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("lightning_compress.training.results.write_compressed_tensors", full_disk)
        keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
        with pytest.raises(OSError, match="No space left") as caught:
            quiet(tmp_path, rounding(), keeping).fit(Regression(), Sums())
    assert caught.value.__notes__ == ["the compressed model, weights stored dense, is in compressed.ckpt"]
    assert Regression.load_from_checkpoint(tmp_path / "compressed.ckpt").is_rounded()
    assert (tmp_path / "report" / "summary.json").exists()
    quiet(tmp_path, rounding()).fit(Regression(), Sums(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert (tmp_path / "compressed" / "model.safetensors").exists()


def test_a_checkpoint_that_fails_leaves_export_and_report(tmp_path, monkeypatch):
    trainer = quiet(tmp_path, rounding(), enable_checkpointing=False)
    monkeypatch.setattr(trainer, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(Regression(), Sums())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "report"]


def test_loggers_get_the_result_once_at_the_last_step_and_only_numbers(tmp_path):
    """Also of a run that was interrupted, resumed, and resumed again when all was done."""

    class Odd(RoundingModifier):
        def on_calibration_end(self, state, event, **kwargs):
            super().on_calibration_end(state, event, **kwargs)
            state.ledger.add("model", "rounding", params=1, bits=float("nan"))

    class Stops(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                raise KeyError("power cut")

    def fit(*callbacks, **options):
        logger = Strict()
        keeping = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
        trainer = quiet(tmp_path, CompressionCallback(Odd()), keeping, *callbacks, logger=logger, log_every_n_steps=1)
        trainer.fit(Regression(), Sums(), **options)
        return [(step, metrics) for step, metrics in logger.rows if any(key.startswith("compress/") for key in metrics)]

    with pytest.raises(KeyError):
        fit(Stops())
    ((step, metrics),) = fit(ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert step == 4
    assert {"compress/val/mse_before", "compress/val/mse_after", "compress/modules"} <= metrics.keys()
    assert "compress/bits_per_weight" not in metrics
    assert fit(ckpt_path=tmp_path / "kept" / "last.ckpt") == []


def test_a_folder_that_answers_otherwise_is_a_warning_and_stands_in_the_report(tmp_path, monkeypatch):
    seen = []

    def answers(model, folder, run, call):
        assert call is None
        seen.append((folder, run().shape, (folder / "config.json").exists()))
        return 0.9, "it answers otherwise"

    monkeypatch.setattr("lightning_compress.export.verify.answers", answers)
    trainer = quiet(tmp_path, rounding(verify=True))
    with pytest.warns(UserWarning, match="it answers otherwise"):
        trainer.fit(Regression(), Sums())
    (folder, shape, written) = seen[0]
    assert (len(seen), folder, written) == (1, tmp_path / "compressed", True)
    assert shape[0] > 1  # one calibration batch
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["verify"] == {"difference": 0.9, "fault": "it answers otherwise"}
    assert not list(tmp_path.glob(".compressed*"))
