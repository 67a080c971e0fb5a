"""What happens at the end of training, and that it happens exactly once, however training ends."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback
from tests.support.training_runs import RecordingModifier, Regression, RoundingModifier, Sums, quiet


def rounding(**options):
    return CompressionCallback(RoundingModifier(data=options.pop("data", True)), **options)


def best(folder):
    return ModelCheckpoint(folder / "checkpoints", monitor="val/mse")


# -- trap 1: the best checkpoint undoes compression -------------------------------------------------------------------


def test_best_means_the_compressed_model(tmp_path):
    trainer, module, data = quiet(tmp_path, rounding(), best(tmp_path)), Regression(), Sums()
    trainer.fit(module, data)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "compressed.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    assert module.is_rounded()


def test_the_best_weights_are_compressed_not_the_last(tmp_path):
    class Worsens(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/mse", float(self.current_epoch))

    module = Worsens()
    checkpoints = best(tmp_path)
    seen = {}

    class Looks(RoundingModifier):
        def on_calibration_start(self, state, event, **kwargs):
            seen.update({n: t.clone() for n, t in state.model.state_dict().items()})
            super().on_calibration_start(state, event, **kwargs)

    trainer = quiet(tmp_path, CompressionCallback(Looks()), checkpoints, max_epochs=3)
    trainer.fit(module, Sums())
    kept = torch.load(next(tmp_path.glob("checkpoints/epoch=0*")), weights_only=True)["state_dict"]
    assert all(torch.equal(seen[n], kept[f"model.{n}"]) for n in seen)


def test_load_best_can_be_left_out(tmp_path):
    trainer, module = quiet(tmp_path, rounding(load_best=False), best(tmp_path)), Regression()
    trainer.fit(module, Sums())
    assert trainer.callbacks[0].done
    assert module.is_rounded()


def test_a_checkpoint_of_this_run_may_hold_objects(tmp_path):
    class Hyper(Regression):
        def __init__(self, net):
            super().__init__()
            self.save_hyperparameters(logger=False)

    module = Hyper(nn.Linear(1, 1))
    quiet(tmp_path, rounding(), best(tmp_path)).fit(module, Sums())
    assert module.is_rounded()


# -- exactly once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}], ids=lambda o: next(iter(o))
)
def test_a_fit_without_training_compresses(tmp_path, options):
    callback, module = rounding(), Regression()
    quiet(tmp_path, callback, **options).fit(module, Sums())
    assert callback.done
    assert module.is_rounded()
    assert (tmp_path / "compressed.ckpt").exists()


def test_loaders_given_to_fit_serve_without_training(tmp_path):
    module, rows = Regression(), Sums().rows
    quiet(tmp_path, rounding(), limit_train_batches=0).fit(module, DataLoader(rows, 4), DataLoader(rows, 4))
    assert module.is_rounded()


def test_fast_dev_run_touches_everything_and_leaves_nothing(tmp_path):
    callback, module = rounding(), Regression()
    quiet(tmp_path, callback, best(tmp_path), fast_dev_run=True).fit(module, Sums())
    assert module.is_rounded()
    assert len(callback.lifecycle.modifiers[0]._seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_finalize_comes_once(tmp_path):
    modifier = RecordingModifier()
    trainer, module = quiet(tmp_path, CompressionCallback(modifier)), Regression()
    trainer.fit(module, Sums())
    trainer.validate(module, Sums(), verbose=False)
    assert modifier._calls.count("finalize") == 1


# -- trap 3: averaging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1)], ids=["EMA", "SWA"])
def test_averaging_after_us_is_refused(tmp_path, averaging):
    with pytest.raises(ValueError, match="WeightAveraging is listed after CompressionCallback"):
        quiet(tmp_path, rounding(), averaging()).fit(Regression(), Sums())


def test_averaging_before_us_is_compressed(tmp_path):
    trainer, module = quiet(tmp_path, EMAWeightAveraging(), rounding(), best(tmp_path)), Regression()
    trainer.fit(module, Sums())
    assert module.is_rounded()
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][n], t) for n, t in module.state_dict().items())


def test_averaging_and_added_tensors_do_not_go_together(tmp_path):
    class Masks(RecordingModifier):
        def on_initialize(self, state, **kwargs):
            state.model[0].register_buffer("mask", torch.ones(8, 8))
            return True

    with pytest.raises(ValueError, match="pairs tensors by position"):
        quiet(tmp_path, EMAWeightAveraging(), CompressionCallback(Masks())).fit(Regression(), Sums())


# -- trap 4: compiled modules -----------------------------------------------------------------------------------------


def test_a_compiled_module_is_seen_through(tmp_path):
    class Compiled(Regression):
        def setup(self, stage):
            if stage == "fit":
                self.model = torch.compile(self.model, backend="eager")

    module = Compiled()
    callback = rounding()
    quiet(tmp_path, callback, limit_train_batches=2).fit(module, Sums())
    assert callback._state.model is module.model._orig_mod
    assert len(callback.lifecycle.modifiers[0]._seen) > 0  # hooks that were added after compilation fire
    assert module.is_rounded()


# -- trap 5: modes ----------------------------------------------------------------------------------------------------


def test_modes_and_random_state_are_given_back(tmp_path):
    stages, states = [], []

    class Looks(Regression):
        def on_train_end(self):
            stages.append(self.trainer.state.stage)
            states.append((self.training, self.model[1].training, torch.get_rng_state()))

    def run(folder, *callbacks):
        torch.manual_seed(1)
        module = Looks()
        module.model[1].eval()
        quiet(folder, *callbacks).fit(module, Sums())
        return module

    run(tmp_path / "without")
    module = run(tmp_path / "with", rounding())
    assert stages == [RunningStage.TRAINING] * 2
    assert states[0][:2] == states[1][:2]
    assert torch.equal(states[0][2], states[1][2])
    assert not any(t.is_inference() for t in (*module.parameters(), *module.buffers()))


def test_the_compressed_model_can_be_trained_on(tmp_path):
    module = Regression()
    quiet(tmp_path / "a", rounding()).fit(module, Sums())
    quiet(tmp_path / "b").fit(module, Sums())
    assert not module.is_rounded()


# -- trap 8: samples --------------------------------------------------------------------------------------------------


def indices(callback):
    """The first column of a row is its index."""
    return [sorted(round(v) for v in batch[:, 0].tolist()) for batch in callback.lifecycle.modifiers[0]._seen]


def test_samples_are_chosen_with_the_seed(tmp_path, caplog):
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # the training loader shuffles differently each time
        callback = rounding(calibration_batches=2, seed=seed)
        with caplog.at_level("INFO"):
            quiet(tmp_path / str(number), callback).fit(Regression(), Sums(batches=8))
        chosen.append(indices(callback))
    assert chosen[0] == chosen[1] != chosen[2]
    flat = [i for batch in chosen[0] for i in batch]
    assert flat == sorted(flat)
    assert len(set(flat)) == 8
    assert f"8 of 32 samples, chosen with seed 0, in order: {flat[0]}, {flat[1]}" in caplog.text


def test_the_datamodule_may_bring_its_calibration_loader(tmp_path):
    class Own(Sums):
        def calibration_dataloader(self):
            return DataLoader(self.rows, 2)

    callback = rounding(calibration_batches=3)
    quiet(tmp_path, callback).fit(Regression(), Own())
    assert indices(callback) == [[0, 1], [2, 3], [4, 5]]


def test_the_module_may_bring_its_calibration_step(tmp_path):
    steps = []

    class Own(Regression):
        def calibration_step(self, batch, batch_idx):
            steps.append((batch_idx, len(batch[0])))
            return self.model(batch[0])

    quiet(tmp_path, rounding(calibration_batches=3)).fit(Own(), Sums())
    assert {(i, 4) for i in (0, 1, 2)} <= set(steps) <= {(i, 4) for i in (0, 1, 2)} | {(0, 1)}  # (0, 1): the probe


def test_fewer_batches_than_asked_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="calibration_batches=16, but the loader gave 4"):
        quiet(tmp_path, rounding()).fit(Regression(), Sums())


def test_an_empty_loader_is_an_error(tmp_path):
    class Empty(Sums):
        def calibration_dataloader(self):
            return DataLoader([], 2)

    with pytest.raises(ValueError, match="the calibration loader is empty"):
        quiet(tmp_path, rounding()).fit(Regression(), Empty())


def test_augmentation_on_the_device_is_off_while_calibrating(tmp_path):
    class Augments(Sums):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1000, batch[1]] if self.trainer.training else batch

    callback = rounding()
    quiet(tmp_path, callback).fit(Regression(), Augments())
    assert max(max(batch) for batch in indices(callback)) < 1000


# -- trap 10: loggers, and the report ---------------------------------------------------------------------------------


def test_scalars_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    quiet(tmp_path, rounding(), logger=loggers).fit(Regression(), Sums())
    for logger in loggers:
        header = (next((tmp_path / logger.name).glob("*/metrics.csv"))).read_text().splitlines()[0]
        assert "compress/val/mse_before" in header
        assert "compress/val/mse_after" in header


# -- what lies beside the model, and what is wrong is told before training --------------------------------------------


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


def test_a_tokenizer_that_cannot_be_saved_is_told_before_training(tmp_path):
    class Unsavable(Regression):
        tokenizer = Processor("no/such/folder")

        def training_step(self, batch, batch_idx):
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"this Processor cannot be saved, so that nothing could be exported"):
        quiet(tmp_path, rounding()).fit(Unsavable(), Sums())


WRONG = [
    ("calibration_batches", 2.5, "is a float, expected a whole number"),
    ("calibration_batches", "16", "is a str, expected a whole number"),
    ("calibration_batches", True, "is a bool, expected a whole number"),
    ("calibration_batches", None, "is a NoneType, expected a whole number"),
    ("calibration_batches", 0, "expected at least 1"),
    ("eval_batches", 1.5, "is a float, expected a whole number"),
    ("eval_batches", 0, "expected at least 1"),
    ("seed", True, "is a bool, expected a whole number"),
    ("seed", "x", "is a str, expected a whole number"),
    ("seed", -1, "expected at least 0"),
    ("seed", 2**63, "less than 2"),
    ("evaluate", "no", "is a str, expected True or False"),
    ("load_best", 1, "is a int, expected True or False"),
    ("moe_calibrate_all_experts", None, "is a NoneType, expected True or False"),
    ("export_dir", 3, "is a int, expected a path"),
    ("walk", "slow", "expected 'auto'"),
    ("offload_device", "gpu", "expected a device such as"),
    ("offload_device", "meta", "expected a device such as"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_arguments_of_a_wrong_type_are_refused_at_once(argument, value, message):
    with pytest.raises(ValueError, match=rf"^{argument}={re.escape(repr(value))}.*{message}"):
        rounding(**{argument: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_missing_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"offload_device='cuda' is not on this machine"):
        quiet(tmp_path, rounding(offload_device="cuda")).fit(Regression(), Sums())


# -- what fails at the end costs nothing else -------------------------------------------------------------------------


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
        patched.setattr("lightning_compress.training.post_training.save", full_disk)
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


# -- strategies, and where it goes ------------------------------------------------------------------------------------


def test_sharded_strategies_are_refused(tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    trainer = quiet(tmp_path, rounding())
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(ValueError, match="shards the weights"):
        trainer.callbacks[0].setup(trainer, Regression(), "fit")


def test_an_export_folder_that_exists_is_an_error_before_training(tmp_path):
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "mine.txt").touch()
    modifier = RecordingModifier()
    with pytest.raises(ValueError, match="exists and is not empty"):
        quiet(tmp_path, CompressionCallback(modifier)).fit(Regression(), Sums())
    assert modifier._events == []


def test_the_learning_rate_finder_is_no_resumed_run(tmp_path):
    class Tunable(Regression):
        lr = 0.01

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    (tmp_path / "compressed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "compressed" / name).touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        quiet(tmp_path, LearningRateFinder(num_training_steps=3), rounding()).fit(Tunable(), Sums())
    callback, module = rounding(export_dir=str(tmp_path / "other")), Tunable()
    quiet(tmp_path, LearningRateFinder(num_training_steps=3), callback).fit(module, Sums())
    assert callback.clock.global_step == 4
    assert module.is_rounded()


def test_blocks_that_match_nothing_are_told_before_training(tmp_path):
    module = Regression()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"blocks=\['layrs'\] matches none"):
        quiet(tmp_path, rounding(blocks=["layrs"])).fit(module, Sums())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# -- the exported folder is read back ----------------------------------------------------------------------------------


def test_a_folder_that_answers_otherwise_is_a_warning_and_stands_in_the_report(tmp_path, monkeypatch):
    seen = []

    def answers(model, folder, run):
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


def test_verify_is_one_of_three():
    with pytest.raises(ValueError, match="verify='always': expected 'auto', True or False"):
        rounding(verify="always")
