"""Batches and loaders of other shapes: what the model cannot take is refused before training."""

import warnings

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import CompressionCallback, GPTQModifier
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet

ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Rows(Regression):
    """Trains and validates on the rows of a batch, whatever they are called; counts the batches of both."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated = 0, []

    def error(self, batch):
        while not isinstance(batch, torch.Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return self.model(batch).square().mean()

    def training_step(self, batch, batch_idx):
        self.trained += 1
        return self.error(batch)

    def validation_step(self, batch, batch_idx):
        self.validated.append(sorted(batch) if isinstance(batch, dict) else len(batch))
        self.log("val/error", self.error(batch))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def named(**names):
    return DataLoader([{**dict.fromkeys(names, row), "label": 1} for row in ROWS], 4)


def rows():
    return DataLoader(ROWS, 4)


def fit(folder, module, *loaders, **options):
    callback = CompressionCallback(RoundingModifier(), calibration_batches=2)
    quiet(folder, callback, num_sanity_val_steps=0, **options).fit(module, *loaders)
    return callback


class Asked(Rows):
    """Brings a loader of its own, which the model cannot take."""

    def calibration_dataloader(self):
        return named(image=1)


@pytest.mark.parametrize(
    ("module", "loader", "keys"),
    [
        (Rows, lambda: named(image=1), ["image", "label"]),
        (Rows, lambda: {"a": rows(), "b": rows()}, ["a", "b"]),
        (Rows, lambda: CombinedLoader({"a": rows(), "b": rows()}, "max_size_cycle"), ["a", "b"]),
        (Asked, rows, ["image", "label"]),
    ],
    ids=["names of its own", "a dict of loaders", "a CombinedLoader", "calibration_dataloader"],
)
def test_what_the_model_cannot_take_is_refused_before_the_first_step(tmp_path, module, loader, keys):
    module = module()
    with pytest.raises(ValueError, match="Sequential.forward takes none of the batch's keys") as raised:
        fit(tmp_path, module, loader())
    assert f"{keys}, but ['input']: write calibration_step(self, batch, batch_idx)" in str(raised.value)
    assert "calibration_dataloader()" in str(raised.value)
    assert module.trained == 0


def test_what_is_said_is_also_what_helps(tmp_path):
    class Step(Rows):
        def calibration_step(self, batch, batch_idx):
            return self.model(batch["a"])

    class Own(Rows):
        def calibration_dataloader(self):
            return rows()

    for number, module in enumerate((Step(), Own())):
        callback = fit(tmp_path / str(number), module, CombinedLoader({"a": rows(), "b": rows()}, "min_size"))
        assert callback.done
        assert module.is_rounded()
        assert module.trained == 4


@pytest.mark.parametrize("step", [False, True])
def test_an_own_loader_is_looked_at_before_training_and_loses_no_batch(tmp_path, step):
    class Own(Rows):
        handed_out, asked = None, 0

        def calibration_dataloader(self):
            self.asked += 1
            return self.handed_out

    class OwnStep(Own):
        def calibration_step(self, batch, batch_idx):
            return self.model(batch)

    module = OwnStep() if step else Own()
    with pytest.raises(ValueError, match=r"Own(Step)?.calibration_dataloader\(\) returned None, expected a DataLoader"):
        fit(tmp_path / "none", module, rows())
    assert module.trained == 0
    module = OwnStep() if step else Own()
    module.handed_out = iter([ROWS[:4], ROWS[4:8]])
    modifier = RoundingModifier()
    callback = CompressionCallback(modifier, calibration_batches=2)
    quiet(tmp_path / "iterator", callback, num_sanity_val_steps=0).fit(module, rows())
    assert module.asked == 1
    assert torch.equal(torch.cat(modifier._seen), ROWS[:8])


def test_nothing_is_asked_where_nothing_calibrates_on_data(tmp_path):
    callback = CompressionCallback(RoundingModifier(data=False))
    quiet(tmp_path, callback).fit(Rows(), named(image=1))
    assert callback.done


def test_keys_that_are_left_out_are_named_as_training_begins(tmp_path):
    class Stops(Rows):
        def training_step(self, batch, batch_idx):
            raise KeyError("first step")

    named_once = pytest.warns(UserWarning, match=r"leaves the keys \['label'\] of a batch out")
    with named_once, pytest.raises(KeyError, match="first step"):
        fit(tmp_path, Stops(), named(input=1))


@pytest.mark.parametrize(
    ("loader", "limit", "batches"),
    [
        (lambda: DataLoader(Stream(), 4), {}, [4] * 4),
        (lambda: DataLoader(Stream(), 4), {"limit_val_batches": 2}, [4] * 2),
        (lambda: [rows(), DataLoader(Stream(), 4)], {"limit_val_batches": 3}, [4] * 6),
        (lambda: CombinedLoader({"a": rows(), "b": rows()}, "max_size"), {}, [["a", "b"]] * 4),
        (lambda: CombinedLoader({"a": rows(), "b": rows()}, "max_size"), {"limit_val_batches": 3}, [["a", "b"]] * 3),
        (lambda: CombinedLoader([rows(), rows()], "sequential"), {}, [4] * 8),
    ],
    ids=["no length", "no length, limited", "two", "side by side", "side by side, limited", "one after the other"],
)
def test_validation_loaders_are_measured_as_the_trainer_validates(tmp_path, loader, limit, batches):
    class Several(Rows):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    module = Several()
    fit(tmp_path, module, rows(), loader(), **limit)
    assert module.validated == batches * 3  # by the Trainer, and before and after compression


def test_a_combined_loader_is_calibrated_on_where_nothing_is_trained(tmp_path):
    class Step(Rows):
        def calibration_step(self, batch, batch_idx):
            assert sorted(batch) == ["a", "b"]
            return self.model(batch["a"])

    module = Step()
    loader = CombinedLoader({"a": rows(), "b": rows()}, "max_size_cycle")
    assert fit(tmp_path, module, loader, limit_train_batches=0).done
    assert module.is_rounded()


def test_a_folder_that_is_deleted_is_not_named(tmp_path, capsys):
    quiet(tmp_path, CompressionCallback(RoundingModifier()), fast_dev_run=True).fit(Regression(), Sums())
    assert "compressed model" not in capsys.readouterr().out
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(Regression(), Sums())
    assert f"compressed model: {tmp_path / 'compressed'}" in capsys.readouterr().out.replace("\n", "")


# -- what is no model, no fit, no Trainer of lightning.pytorch --------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "net", "layer"])
def test_a_linear_probe(tmp_path, name):
    class Probe(Regression):
        def __init__(self):
            super().__init__()
            del self.model
            setattr(self, name, nn.Linear(8, 1))

        def forward(self, x):
            return getattr(self, name)(x)

    module = Probe()
    modifier = GPTQModifier(scheme="W8A16", group_size=-1)
    quiet(tmp_path, CompressionCallback(modifier, calibration_batches=2)).fit(module, Sums())
    fresh = Probe()
    fresh.load_state_dict(torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(fresh(ROWS), module(ROWS))
    assert set(load_file(tmp_path / "compressed" / "model.safetensors")) >= {f"{name}.weight_packed", f"{name}.bias"}


def test_a_test_without_a_fit_says_that_nothing_was_compressed(tmp_path):
    module, data = Regression(), Sums()
    told = "has compressed nothing: it acts at the end of trainer.fit.*trainer.max_epochs=0"
    with pytest.warns(UserWarning, match=told):
        quiet(tmp_path, CompressionCallback(RoundingModifier())).test(module, data, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compressed nothing")
        trainer = quiet(tmp_path, CompressionCallback(RoundingModifier()), max_epochs=0)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        assert module.is_rounded()
        again = quiet(tmp_path, CompressionCallback(RoundingModifier()))
        again.test(Regression(), data, ckpt_path=tmp_path / "compressed.ckpt", verbose=False)


def test_objects_of_pytorch_lightning_are_named(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel

    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[CompressionCallback(RoundingModifier())],
                         default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=False)  # fmt: skip
    with pytest.raises(ValueError, match="is a Trainer of pytorch_lightning.*write import lightning.pytorch as pl"):
        trainer.fit(BoringModel())
