"""Errors before training instead of after it."""

from pathlib import Path

import pytest
import torch

from tests.support.training_runs import Regression, Sums, quiet, rounding


class Processor:
    """Writes files of its name, as tokenizers and processors do."""

    def __init__(self, *names):
        self.names = names

    def save_pretrained(self, folder):
        for name in self.names:
            Path(folder, f"{name}.json").write_text(str(self.names))


def test_a_tokenizer_that_cannot_be_saved_is_told_before_training(tmp_path):
    class Unsavable(Regression):
        tokenizer = Processor("no/such/folder")

        def training_step(self, batch, batch_idx):
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"this Processor cannot be saved, so that the export at the end would fail"):
        quiet(tmp_path, rounding()).fit(Unsavable(), Sums())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_missing_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"offload_device='cuda' is not on this machine"):
        quiet(tmp_path, rounding(offload_device="cuda")).fit(Regression(), Sums())


def test_blocks_that_match_nothing_are_told_before_training(tmp_path):
    module = Regression()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"blocks=\['layrs'\] matches none"):
        quiet(tmp_path, rounding(blocks=["layrs"])).fit(module, Sums())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
