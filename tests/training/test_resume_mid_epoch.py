"""Resuming inside an epoch: which batches come again."""

import json
import warnings

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, StopAfter, Sums, quiet


@pytest.mark.parametrize("stateful", [False, True])
def test_batches_that_a_loader_without_a_state_repeats_are_named(tmp_path, stateful):
    class Counting(DataLoader):
        state_dict = lambda self: {}  # noqa: E731
        load_state_dict = lambda self, state: None  # noqa: E731

    def fit(*callbacks, **options):
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
        callback = CompressionCallback(RoundingModifier(data=False), evaluate=False)
        loader = (Counting if stateful else DataLoader)(Sums().rows, 4)
        quiet(tmp_path, kept, callback, *callbacks).fit(Regression(), loader, **options)

    with pytest.raises(KeyError, match="power cut"):
        fit(StopAfter(3))  # the checkpoint is that of step 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ckpt_path=tmp_path / "kept" / "last.ckpt")
    told = [str(w.message) for w in caught if "begins the epoch again, so that 2 batches come again" in str(w.message)]
    assert len(told) == (not stateful)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary.get("batches_repeated_on_resume") == (None if stateful else 2)
