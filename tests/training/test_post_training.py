"""What happens at the end of training, and that it happens exactly once, however training ends."""

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback
from tests.support.training_runs import RecordingModifier, Regression, Sums, best, quiet, rounding


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


def test_the_compressed_model_can_be_trained_on(tmp_path):
    module = Regression()
    quiet(tmp_path / "a", rounding()).fit(module, Sums())
    quiet(tmp_path / "b").fit(module, Sums())
    assert not module.is_rounded()


class Processor:
    """Writes files of its name, as tokenizers and processors do."""

    def __init__(self, *names):
        self.names = names

    def save_pretrained(self, folder):
        for name in self.names:
            Path(folder, f"{name}.json").write_text(str(self.names))
